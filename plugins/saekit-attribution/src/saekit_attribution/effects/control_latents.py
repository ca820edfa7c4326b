"""How often and how strongly latents are active on prompts, by which control latents are matched with chosen ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit import SparseAutoencoder, Subject, TokenBatch, own_numerics


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
