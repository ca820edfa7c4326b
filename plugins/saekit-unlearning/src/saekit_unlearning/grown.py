"""Detectors and their rows inside a trained SAE: latents added after its own, so that each row serves one purpose.

The SAE's own latents rebuild, as they did; the added ones only push, and say so in the metadata that are saved with it. It stays
of its architecture, whose gate decides when an added latent fires: exactly where its detector does, which is checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import Registry, SparseAutoencoder, UsageError, save_sae
from saekit_unlearning.detectors import Detectors

LIFT = 1000.0
"""What detectors' activations are multiplied by, and rows divided by, so that under a top-k gate they are among the largest."""


@torch.no_grad()
def grown(
    sae: SparseAutoencoder, name: str, detectors: Detectors, sample: Tensor, *, registry: Registry | None = None
) -> tuple[SparseAutoencoder, Tensor]:
    """(`sae` with a latent more for each detector, the new latents [n]); their decoder rows are zeros.

    name: of the SAE's architecture. sample: [m, d_in], activations on some of which detectors fire; on them the new latents are
    compared with the detectors. UsageError if they differ, or if the SAE is a transcoder."""
    if sae.transcoder:
        raise UsageError(
            "a transcoder rebuilds another site than the one it reads, so its rows cannot push there. Take an SAE."
        )
    component = (registry or Registry()).find("architecture", name)
    n = len(detectors.entities)
    options = {**sae.options(), "decoder_norm": "free"}  # a push is as long as it has to be
    new: SparseAutoencoder = component.build(component.validate(options, name), sae.d_in, sae.d_sae + n)
    new = new.to(sae.W_dec).eval().requires_grad_(False)
    new.trained_positions = sae.trained_positions
    new.take_over(sae)
    latents = torch.arange(sae.d_sae, new.d_sae, device=new.W_dec.device)
    for parameter, value in new.latent_parameters.items():
        getattr(new, parameter)[latents] = value
    new.W_enc[:, latents] = LIFT * detectors.weight.to(new.W_enc)
    zero = torch.zeros(1, sae.d_in).to(new.W_dec)
    threshold = getattr(new, "threshold", None)  # what a pre-activation must exceed, in architectures that have one
    fires_at = zero.new_zeros(()) if threshold is None else (threshold[latents] if threshold.dim() else threshold)
    wanted = LIFT * (detectors.scores(zero) - detectors.threshold.to(zero))[0] + fires_at  # [n], at x = 0
    shift = zero.new_zeros(new.d_sae)
    shift[latents] = wanted - new.pre_activations(zero, latents)[0]
    new.shift_pre_activations(shift)
    ours, theirs = new.encode(sample.to(zero)).columns(latents) > 0, detectors(sample.to(zero)) > 0  # [m, n]
    if bool((ours != theirs).sum() > 0.001 * theirs.sum().clamp_min(1)):
        raise UsageError(
            f"under the gate of {name!r}, added latents fire in {int(ours.sum())} of {ours.numel()} places, but their detectors in "
            f"{int(theirs.sum())}. Take an SAE of another architecture, such as topk, batchtopk, jumprelu or gated."
        )
    return new, latents


@torch.no_grad()
def with_rows(sae: SparseAutoencoder, latents: Tensor, rows: Tensor) -> SparseAutoencoder:
    """`sae`, with `rows` [n, d] as the decoder rows of `latents`."""
    sae.W_dec[latents] = rows.to(sae.W_dec)
    return sae


def save_grown(
    sae: SparseAutoencoder,
    directory: str | Path,
    *,
    name: str,
    latents: Tensor,
    detectors: Detectors,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write it. `cfg.json` then says in `metadata.unlearning` which rows rebuild (`reconstruction`: from, to) and which push, each
    with what its latent detects (`push`)."""
    first = int(latents.min())
    roles = {
        "reconstruction": [0, first],
        "push": {str(latent): entity for latent, entity in zip(latents.tolist(), detectors.entities, strict=True)},
    }
    return save_sae(sae, directory, name=name, metadata={**(metadata or {}), "unlearning": roles})
