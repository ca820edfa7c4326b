"""Rows out of sequences: every position that is not padding, or one vector for each sequence."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from saekit.errors import OptionError

Pool = Literal["none", "mean", "max", "first", "last"]
"""What becomes of a sequence: each of its positions, their mean or maximum, or the first or last of them."""


def pooled(x: Tensor, mask: Tensor | None = None, how: Pool = "none") -> Tensor:
    """Activations [n, d] as they are, or sequences [n, T, d] as rows: [rows, d]. mask: [n, T], zero at padding, which is never
    a row or part of one. A sequence that is all padding gives no row. OptionError for other shapes."""
    if how not in get_args(Pool):
        raise OptionError("pool", f"{how!r} is not a way to pool. Choose one of {', '.join(get_args(Pool))}.")
    if x.ndim == 2 and how == "none":
        if mask is not None and mask.shape != x.shape[:1]:
            raise OptionError("mask", f"is {list(mask.shape)} for activations {list(x.shape)}. Give one number for each row.")
        return x if mask is None else x[mask.to(x.device).bool()]
    if x.ndim != 3:
        wanted = "[n, d] or [n, T, d]" if how == "none" else "[n, T, d]"
        raise OptionError("pool", f"{how!r} takes activations {wanted}, and these are {list(x.shape)}. Bring them into that shape.")
    if mask is None:
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)  # [n, T]
    elif mask.shape == x.shape[:2]:
        keep = mask.to(x.device).bool()
    else:
        raise OptionError("mask", f"is {list(mask.shape)} for activations {list(x.shape)}. Give one number for each position.")
    if how == "none":
        return x[keep]
    x, keep = x[keep.any(1)], keep[keep.any(1)]
    if how == "mean":
        return x.masked_fill(~keep[..., None], 0).sum(1) / keep.sum(1, keepdim=True)
    if how == "max":
        return x.masked_fill(~keep[..., None], -torch.inf).amax(1)
    place = keep.long().argmax(1) if how == "first" else keep.shape[1] - 1 - keep.long().flip(1).argmax(1)  # [n]
    return x[torch.arange(len(x), device=x.device), place]
