"""Features of an encoder that is not trained: its last hidden state, pooled over the tokens of the response."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from saekit_quality.data import QualityData
from saekit_quality.tokens import TooLong, tokenise
from saekit_quality.votes import Floats

Pooling = Literal["mean", "last"]


def frozen_features(
    data: QualityData,
    model: Any,
    tokenizer: Any,
    *,
    pooling: Pooling = "mean",
    batch: int = 64,
    too_long: TooLong = "truncate",
) -> Floats:
    """[n, d] float32. model: an encoder or decoder of transformers without its head, in evaluation mode.

    pooling: the mean over the response's tokens, or the last of them. A decoder's states of a response have seen its context.
    UsageError as `tokenise`.
    """
    import torch

    # RoBERTa has two positions more than tokens that fit; its tokenizer knows.
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 512)
    rows = tokenise(data.contexts, data.responses, tokenizer, limit, too_long)
    order = sorted(range(len(data)), key=lambda i: len(rows.ids[i]))  # similar lengths together, for little padding
    found: np.ndarray | None = None
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = len(rows.ids[chosen[-1]])
        ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
        attended = torch.zeros_like(ids)
        pooled = torch.zeros(len(chosen), width)  # the weight of each token
        for row, i in enumerate(chosen):  # padding on the right: causal attention never sees it
            n, types = len(rows.ids[i]), torch.tensor(rows.types[i])
            ids[row, :n], attended[row, :n] = torch.tensor(rows.ids[i]), 1
            if pooling == "mean":
                pooled[row, :n] = types / types.sum()
            else:
                pooled[row, n - 1] = 1
        with torch.no_grad():
            out = model(ids.to(model.device), attention_mask=attended.to(model.device))
            z = torch.einsum("nt,ntd->nd", pooled.to(model.device), out.last_hidden_state.float()).cpu().numpy()
        found = np.empty((len(data), z.shape[1]), dtype=np.float32) if found is None else found
        found[chosen] = z
    assert found is not None  # there is at least one response
    return found
