"""New weights for latents, from inputs that are rebuilt badly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saekit import Training


@torch.no_grad()
def renew(trainer: Training, latents: Tensor, *, encoder_scale: float = 0.2) -> Tensor:
    """Give latents [n] new weights and fresh moments (Bricken et al. 2023, "Neuron resampling"). Returns those that got them.

    Inputs are drawn from the step's batch without replacement, with probability proportional to their squared reconstruction
    error, so no more latents are renewed than rows have an error. An input's direction becomes the decoder row, at the mean norm
    of the other latents, and the encoder, at `encoder_scale` of their mean norm. Retired latents count among nothing here.
    """
    sae, step = trainer.sae, trainer.step
    error = step.error.square().sum(1).cpu()  # [batch]
    latents = latents[: min(len(latents), int((error > 0).sum()))]
    if len(latents) == 0:
        return latents
    rows = torch.multinomial(error.double(), len(latents), replacement=False, generator=trainer.generator)
    rows = rows.to(step.x.device)  # [n]
    living = ~trainer.firing.retired
    living[latents] = False
    any_lives = bool(living.any())
    norm = sae.W_enc[:, living].norm(dim=0).mean() if any_lives else sae.W_enc.new_ones(())
    sae.W_enc[:, latents] = encoder_scale * norm * normalize(sae.centred(step.x[rows]), dim=1).t()  # [d_in, n]
    rebuilt = normalize(step.target[rows] - sae.skipped(step.x[rows]) - sae.b_dec, dim=1)  # [n, d_out]
    sae.W_dec[latents] = rebuilt * (sae.W_dec[living].norm(dim=1).mean() if any_lives else 1.0)
    for name, value in sae.latent_parameters.items():
        getattr(sae, name)[latents] = value
    _reset_moments(trainer, latents)
    trainer.firing.revive(latents)
    return latents


def _reset_moments(trainer: Training, latents: Tensor) -> None:
    sae = trainer.sae
    for name in ("W_enc", "W_dec", *sae.latent_parameters):
        state = trainer.optimizer.state[getattr(sae, name)]
        for moment in state.keys() & {"exp_avg", "exp_avg_sq"}:  # absent until a loss has reached the parameter
            (state[moment].T if name == "W_enc" else state[moment])[latents] = 0.0
