"""`top_examples`: where some latents fire most on held-out data, as rows of a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saekit.runner.context import RunContext


@torch.no_grad()
def top_examples(
    context: RunContext, latents: list[int], *, n: int = 5, window: int = 12, tokens: int | None = None
) -> list[dict[str, Any]]:
    """The `n` strongest activations of each latent, at most one in a row of tokens, with `window` tokens on each side.

    tokens: how many held-out activations to look through; `evaluation.tokens` by default. Returns rows of a table that
        `saekit.Result` shows as text with the token highlighted; no rows if the source has no tokens.
    """
    if not latents:
        return []
    chosen = torch.tensor(latents, device=context.device)
    activations, ids, sequences = [], [], []
    for batch in context.held_out_activations(tokens or context.config.evaluation.tokens):
        if batch.tokens is None or batch.sequence is None:
            return []
        # Only the columns of the chosen latents are kept, never the whole code.
        activations.append(context.sae.encode(batch.x).columns(chosen).float().cpu())  # [batch, latents]
        ids.append(batch.tokens.cpu())
        sequences.append(batch.sequence.cpu())
    activation, token, sequence = torch.cat(activations), torch.cat(ids), torch.cat(sequences)
    rows = []
    for column, latent in enumerate(latents):
        values = activation[:, column]
        for rank, place in enumerate(_strongest(values, sequence, n), start=1):
            around = _around(place, sequence, window)
            strings = context.source.token_strings(token[around])
            here = place - int(around[0])
            rows.append(
                {
                    "latent": latent,
                    "rank": rank,
                    "activation": float(values[place]),
                    "before": "".join(strings[:here]),
                    "token": strings[here],
                    "after": "".join(strings[here + 1 :]),
                    "tokens": strings,
                    "activations": [round(float(v), 4) for v in values[around]],
                }
            )
    return rows


def _strongest(activation: Tensor, sequence: Tensor, n: int) -> list[int]:
    """Places of the strongest activations, at most one in each row of tokens, and only where the latent fires."""
    places: list[int] = []
    seen: set[int] = set()
    values, order = activation.sort(descending=True, stable=True)
    for value, place in zip(values.tolist(), order.tolist(), strict=True):
        if value <= 0 or len(places) == n:
            break
        if int(sequence[place]) not in seen:
            seen.add(int(sequence[place]))
            places.append(place)
    return places


def _around(place: int, sequence: Tensor, window: int) -> Tensor:
    """The places around `place` that belong to the same row of tokens."""
    around = torch.arange(max(0, place - window), min(len(sequence), place + window + 1))
    return around[sequence[around] == sequence[place]]
