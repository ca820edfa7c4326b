"""Statistics of latents on held-out activations: largest activation, RMS and standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saekit import RunContext, latent_statistics, own_numerics


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


@torch.no_grad()
def activation_statistics(context: RunContext, tokens: int) -> ActivationStatistics:
    """The statistics over at most `tokens` held-out activations."""
    sae = context.sae
    batches = [batch.x * context.scale for batch in context.held_out_activations(tokens)]
    units = latent_statistics(sae, batches)
    sums = torch.zeros(2, sae.d_sae, dtype=torch.float64, device=context.device)  # of values and of squares
    norms, rows = 0.0, 0
    for x in batches:
        with own_numerics(sae, x.device):
            _, latents, values = sae.encode(x.to(sae.W_dec.dtype)).nonzero()
        sums[0].index_add_(0, latents, values.double())
        sums[1].index_add_(0, latents, values.double().square())
        norms, rows = norms + float(x.norm(dim=1).double().sum()), rows + len(x)
    mean, square = sums / rows
    return ActivationStatistics(units["max"], units["rms"], (square - mean.square()).clamp_min(0).sqrt(), norms / rows, rows)
