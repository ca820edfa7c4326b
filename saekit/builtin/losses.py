"""The built-in losses: each takes a `Step` and returns a scalar, before its weight."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from saekit.sae.kernels import Pattern, decode_sparse
from saekit.training.step import Step


def mse(step: Step) -> torch.Tensor:
    """Squared reconstruction error, averaged over the batch and the target's coordinates."""
    return step.error.square().mean()


def l1(
    step: Step,
    *,
    by_decoder_norm: Annotated[
        bool, Field(description="Weight each latent by its decoder row's norm (Conerly et al. 2024, update of April).")
    ] = False,
) -> torch.Tensor:
    """Mean over the batch of the L1 norm of the code (Bricken et al. 2023)."""
    if by_decoder_norm:
        return step.code.weighted_sum(step.sae.W_dec.norm(dim=1)).mean()
    return step.code.sum().mean()


class AuxK:
    """Dead latents rebuild what the living ones missed (Gao et al. 2024, appendix A.2).

    The top `k` dead latents by pre-activation, through a ReLU, are decoded without the bias; the loss is their squared
    error against the detached residual, in units of the residual's variance. It has nothing to say while no latent
    is dead.
    """

    def __init__(
        self, *, k: Annotated[int | None, Field(gt=0, description="Dead latents used a row; half of d_in by default.")] = None
    ) -> None:
        self.k = k

    def active(self, step: Step) -> bool:
        """Only where some latent is dead."""
        return step.dead is not None and step.n_dead > 0

    def __call__(self, step: Step) -> torch.Tensor:
        assert step.dead is not None  # see `active`
        sae, residual = step.sae, step.error.detach()  # [batch, d_out]
        dead = step.dead.nonzero().squeeze(1)  # [n_dead]
        pre = step.code.pre(dead)  # [batch, n_dead]
        k = min(self.k or max(1, sae.d_in // 2), dead.shape[0])
        values, chosen = pre.topk(k, dim=1, sorted=False)  # [batch, k]
        pattern = Pattern.regular(dead[chosen], sae.d_sae)
        rebuilt = decode_sparse(values.relu().reshape(-1), sae.W_dec, torch.zeros_like(sae.b_dec), pattern)
        spread = (residual - residual.mean(0)).square().mean()
        return ((residual - rebuilt).square().mean() / spread.clamp_min(1e-12)).nan_to_num(0.0)
