"""`PositionScores`: a method's scores position by position, the largest alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saekit_attribution.effects.nodes import Nodes


@dataclass(frozen=True)
class PositionScores:
    """The scores at one position of a sample, in logits. Over all positions they add up to the latents' scores.

    position: from 0, in the sample's tokens.
    error: the score of the SAE's error there.
    latents, scores, activations: of the latents with the largest absolute scores there, largest first; never a score of zero.
    """

    position: int
    error: float
    latents: list[int]
    scores: list[float]
    activations: list[float]


def by_position(
    nodes: Nodes, scores: Tensor, errors: Tensor, *, most: int, offset: int
) -> list[tuple[PositionScores, ...]]:
    """For each of the `n` samples, the positions with any score that is not zero, in order.

    scores: [E], of each entry. errors: [n, P]. most: latents for each position. offset: the first of the P positions."""
    n, width = errors.shape
    group = nodes.rows * width + nodes.positions  # [E]
    order = scores.abs().argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    counts = torch.bincount(group, minlength=n * width)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[group[order]]
    kept = order[(rank < most) & (scores[order] != 0)]
    parts = torch.bincount(group[kept], minlength=n * width).tolist()
    latents, values, activations = (
        t[kept].cpu().split(parts) for t in (nodes.latents, scores.detach(), nodes.values.detach())
    )
    wrong = errors.detach().flatten().tolist()
    return [
        tuple(
            PositionScores(offset + p, wrong[g], latents[g].tolist(), values[g].tolist(), activations[g].tolist())
            for p, g in enumerate(range(row * width, (row + 1) * width))
            if parts[g] or wrong[g]
        )
        for row in range(n)
    ]
