"""Statistics of latents on held-out activations (largest activation, RMS and standard deviation), and directions like them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit import RunContext, SparseAutoencoder, latent_statistics, own_numerics


@dataclass(frozen=True)
class ActivationStatistics:
    """largest, rms, std: [d_sae] each; rms over the activations where the latent is not zero, std over all of them.
    norm: mean norm of the activations.
    rows: the number of activations."""

    largest: Tensor
    rms: Tensor
    std: Tensor
    norm: float
    rows: int


def held_out_batches(context: RunContext, tokens: int) -> list[Tensor]:
    """At most `tokens` held-out activations as the SAE reads them, in batches [n, d_in]."""
    return [batch.x * context.scale for batch in context.held_out_activations(tokens)]


@torch.no_grad()
def activation_statistics(sae: SparseAutoencoder, batches: Sequence[Tensor]) -> ActivationStatistics:
    """The statistics over batches [n, d_in] of what the SAE reads."""
    units = latent_statistics(sae, batches)
    sums = torch.zeros(2, sae.d_sae, dtype=torch.float64, device=batches[0].device)  # of values and of squares
    norms, rows = 0.0, 0
    for x in batches:
        with own_numerics(sae, x.device):
            _, latents, values = sae.encode(x.to(sae.W_dec.dtype)).nonzero()
        sums[0].index_add_(0, latents, values.double())
        sums[1].index_add_(0, latents, values.double().square())
        norms, rows = norms + float(x.norm(dim=1).double().sum()), rows + len(x)
    mean, square = sums / rows
    return ActivationStatistics(units["max"], units["rms"], (square - mean.square()).clamp_min(0).sqrt(), norms / rows, rows)


@torch.no_grad()
def directions_like(batches: Sequence[Tensor], n: int, seed: int) -> Tensor:
    """`n` random directions with the covariance of activations, in batches [rows, d_in]: [n, d_in].

    Each is X^T g / sqrt(rows) for the centred activations X [rows, d_in] and independent standard normal numbers g [rows]:
    normal with mean 0 and covariance X^T X / rows, which needs not be computed. Batch by batch, so X is not held twice."""
    generator = torch.Generator().manual_seed(seed)
    place, d_in = batches[0].device, batches[0].shape[1]
    sums, total = (torch.zeros(*shape, dtype=torch.float64, device=place) for shape in ((n, d_in), (d_in,)))
    of_draws, rows = torch.zeros(n, dtype=torch.float64, device=place), 0
    for x in batches:
        draws = torch.randn(n, len(x), generator=generator).to(place)
        sums += draws.to(x.dtype) @ x
        total, of_draws, rows = total + x.double().sum(0), of_draws + draws.double().sum(1), rows + len(x)
    return (sums - of_draws[:, None] * (total / rows)) / rows**0.5
