"""Control latents: random ones that are as often and as strongly active on the same prompts as the chosen ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit import SparseAutoencoder, Subject, TokenBatch, own_numerics

NEIGHBOURS = 8
"""How many of the most similar latents each control is drawn from."""


@dataclass(frozen=True)
class Activity:
    """density: [d_sae], the share of positions at which each latent is active. mean: [d_sae], its mean activation there."""

    density: Tensor
    mean: Tensor


@torch.no_grad()
def activity(subject: Subject, sae: SparseAutoencoder, batches: Iterable[TokenBatch]) -> Activity:
    """How active each latent is at the kept positions of `batches`."""
    count, total, positions = torch.zeros(sae.d_sae), torch.zeros(sae.d_sae, dtype=torch.float64), 0
    for batch in batches:
        x = subject.activations(batch)[batch.keep.to(subject.device)]  # [positions, d]
        with own_numerics(sae, x.device):
            _, latents, values = (t.cpu() for t in sae.encode(x.to(sae.W_dec.dtype)).nonzero())
        count += torch.bincount(latents, minlength=sae.d_sae)
        total.index_add_(0, latents, values.double())
        positions += len(x)
    return Activity(count / max(positions, 1), (total / count.clamp_min(1)).float())


def matched_controls(chosen: Sequence[int], found: Activity, generator: torch.Generator) -> list[int]:
    """For each chosen latent a similar one, drawn from its nearest in log density and log mean activation.

    No chosen latent is drawn, and none is drawn twice. Only latents that are active on these prompts are drawn; if
    these run out, the list is shorter than `chosen`."""
    free = found.density > 0
    free[list(chosen)] = False
    place = torch.stack(
        [found.density.clamp_min(1e-9).log(), found.mean.abs().clamp_min(1e-9).log()], dim=1
    )  # [d_sae, 2]
    drawn: list[int] = []
    for latent in chosen:
        candidates = free.nonzero().flatten()
        if not len(candidates):
            break
        distance = (place[candidates] - place[latent]).square().sum(1)
        near = distance.topk(min(NEIGHBOURS, len(candidates)), largest=False).indices
        pick = near[torch.randint(len(near), (1,), generator=generator)]
        latent_drawn = int(candidates[pick])
        free[latent_drawn] = False
        drawn.append(latent_drawn)
    return drawn
