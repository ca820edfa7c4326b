"""Pooling: one code for a sequence from the codes of its positions."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from saekit import Code

Pool = Annotated[
    Literal["mean", "max", "last"],
    Field(
        description="How the codes of a sequence's positions become one: their mean, their maximum, or the last one."
    ),
]
"""The type of an option that chooses how to pool."""


def pooled(code: Code, sequence: Tensor, n: int, how: Pool = "mean") -> Tensor:
    """The code of each of n sequences, [n, d_sae], with gradients to the activations that are not zero.

    sequence: [positions], the sequence of each row of the code, 0 to n - 1; positions of one sequence are in order. A
        sequence without positions has a code of zero."""
    rows, latents, values = code.nonzero()
    if how == "last":
        position = torch.arange(len(sequence), device=sequence.device)
        last = torch.full((n,), -1, device=sequence.device).scatter_reduce(0, sequence, position, "amax")  # [n]
        kept = last[sequence[rows]] == rows
        rows, latents, values = rows[kept], latents[kept], values[kept]
    place = sequence[rows] * code.d_sae + latents  # [nnz]
    flat = values.new_zeros(n * code.d_sae)
    if how == "max":
        return flat.scatter_reduce(0, place, values, "amax").view(n, code.d_sae)
    sums = flat.index_add(0, place, values).view(n, code.d_sae)
    if how == "last":
        return sums
    return sums / torch.bincount(sequence, minlength=n).clamp_min(1)[:, None]


def halves(sequence: Tensor) -> Tensor:
    """A random half, 0 or 1, for each position, as equal in size as possible within each sequence: [positions].

    sequence: [positions], in order. Draws from torch's default generator, whose state is part of checkpoints."""
    draws = torch.rand(len(sequence)).to(sequence.device)
    order = (sequence + draws.double()).argsort()
    counts = torch.bincount(sequence) if len(sequence) else sequence
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return (place - starts[sequence]) % 2
