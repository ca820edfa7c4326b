"""Random latents like those that were chosen: as often active and as strongly, on the same prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit import SparseAutoencoder, Subject, TokenBatch, own_numerics

NEIGHBOURS = 8
"""A control is drawn from so many latents that are the most like the chosen one."""


@dataclass(frozen=True)
class Activity:
    """density: [d_sae], the share of positions at which each latent is active. mean: [d_sae], its mean activation there."""

    density: Tensor
    mean: Tensor


def batch_of(rows: Sequence[Sequence[int]], *, skip_first: bool) -> TokenBatch:
    """Token rows of one length as a batch; `keep` leaves the first position out where `skip_first`."""
    tokens = torch.tensor([list(row) for row in rows])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    keep = mask.clone()
    keep[:, 0] &= not skip_first
    return TokenBatch(tokens, mask, keep, torch.arange(len(tokens)))


@torch.no_grad()
def activity(subject: Subject, sae: SparseAutoencoder, batches: Iterable[TokenBatch]) -> Activity:
    """How active each latent is at the kept positions of some texts."""
    count, total, positions = torch.zeros(sae.d_sae), torch.zeros(sae.d_sae, dtype=torch.float64), 0
    for batch in batches:
        x = subject.activations(batch)[batch.keep.to(subject.device)]  # [positions, d]
        with own_numerics(sae, x.device):
            _, latents, values = (t.cpu() for t in sae.encode(x.to(sae.W_dec.dtype)).nonzero())
        count += torch.bincount(latents, minlength=sae.d_sae)
        total.index_add_(0, latents, values.double())
        positions += len(x)
    return Activity(count / max(positions, 1), (total / count.clamp_min(1)).float())


def matched(chosen: Sequence[int], found: Activity, generator: torch.Generator) -> list[int]:
    """For each chosen latent another one like it, drawn from its nearest in log density and log mean activation.

    None of them is chosen, and none is drawn twice. Only latents that are active on these prompts are drawn; where
    they run out, the list is shorter than `chosen`."""
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
