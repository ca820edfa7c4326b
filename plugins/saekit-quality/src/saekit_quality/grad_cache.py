"""A batch that is encoded a few rows at a time, so that the contrastive loss may compare more rows than memory has room for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(encode: Callable[..., tuple[Tensor, ...]], chunk_size: int, **inputs: Tensor | None) -> tuple[Tensor, ...]:
    """encode(**inputs), a few rows at a time: a cache of gradients (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size
    under Memory Limited Setup").

    Of each chunk only the rows that go in and those that come out are kept. The loss of the whole batch gives each output its
    gradient; then each chunk is encoded once more, with the random state (dropout's) of its first time, and its gradient
    goes on from there. The gradient is that of the whole batch encoded at once with the same dropout; it costs one more
    forward pass. `torch.utils.checkpoint` does the second pass, and restores the state of autocast too.

    chunk_size: rows at a time.
    inputs: [n, ...] each; None is passed on.
    """
    (n,) = {len(tensor) for tensor in inputs.values() if tensor is not None}
    parts = []
    for start in range(0, n, chunk_size):
        chunk = {k: None if v is None else v[start : start + chunk_size] for k, v in inputs.items()}
        if torch.is_grad_enabled():
            parts.append(checkpoint(partial(encode, **chunk), use_reentrant=False, preserve_rng_state=True))
        else:
            parts.append(encode(**chunk))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
