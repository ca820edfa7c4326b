"""The built-in losses. Each takes a `Step` and returns a scalar, which the run multiplies by the loss's weight."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from saekit.sae.code import SparseCode
from saekit.sae.kernels import Pattern, decode_sparse
from saekit.training.loss_input import Step


def mse(step: Step) -> torch.Tensor:
    """Squared reconstruction error, averaged over the batch and the coordinates of the target."""
    return step.error.square().mean()


def l1(
    step: Step,
    *,
    by_decoder_norm: Annotated[
        bool, Field(description="Weight each latent by its decoder row's norm (Conerly et al. 2024, update of April).")
    ] = True,
) -> torch.Tensor:
    """L1 norm of the code, averaged over the batch (Bricken et al. 2023), in units of what each latent adds."""
    if by_decoder_norm and step.sae.decoder_norm != "unit":
        return step.code.weighted_sum(step.sae.W_dec.norm(dim=1)).mean()
    return step.code.sum().mean()


def gate_sum(step: Step) -> torch.Tensor:
    """Sum of the gates, averaged over the batch: L0 for jumprelu (Rajamanoharan et al. 2024b, eq. 9, with its
    straight-through gradient), the L1 norm of the gates after their ReLU for gated (Rajamanoharan et al. 2024a, eq. 8)."""
    return _sparse(step).gate_sum().mean()


def gated_aux(step: Step) -> torch.Tensor:
    """Squared error of what the gates alone, after their ReLU, rebuild through a frozen decoder (Rajamanoharan et al. 2024a,
    eq. 8)."""
    code, sae = _sparse(step), step.sae
    assert code.gates is not None  # guaranteed by the need `gate_activations`
    rebuilt = decode_sparse(code.gates, sae.W_dec.detach(), sae.b_dec.detach(), code.pattern)  # [batch, d_out]
    skipped = sae.skipped(step.x).detach()  # frozen like the decoder
    return (step.target - skipped - rebuilt).square().mean()


def matryoshka(step: Step) -> torch.Tensor:
    """Squared error of every nested dictionary's reconstruction, averaged over dictionaries, batch and coordinates (Bussmann
    et al. 2025, eq. 3). It replaces `mse`, since the last of them is the whole dictionary."""
    sae: Any = step.sae  # has the method, guaranteed by the need `nested_reconstructions`
    nested = sae.nested_reconstructions(step.code)  # [prefixes, batch, d_out]
    return (step.target - sae.skipped(step.x) - nested).square().mean()


class Decorrelation:
    """Mean squared correlation over the batch between the activations of different latents.

    Only the `latents` that fired most in the batch take part, so that [batch, d_sae] is never built. A latent that hardly
    varies is left out.
    """

    def __init__(
        self, *, latents: Annotated[int, Field(gt=1, description="How many of the most frequent latents take part.")] = 256
    ) -> None:
        self.latents = latents

    def __call__(self, step: Step) -> torch.Tensor:
        code = step.code
        chosen = code.fired().topk(min(self.latents, code.d_sae)).indices  # [n]
        values = code.columns(chosen)  # [batch, n]
        centred = values - values.mean(0)  # [batch, n]
        spread = centred.square().sum(0)  # [n]
        varies = spread.detach() > 1e-6 * values.detach().square().sum(0)  # [n]
        scaled = centred * torch.where(varies, spread, 1.0).rsqrt() * varies  # [batch, n]
        correlation = scaled.t() @ scaled  # [n, n], with ones on the diagonal for latents that vary
        n = correlation.shape[0]
        off_diagonal = correlation - torch.diag(correlation.diagonal())
        return off_diagonal.square().sum() / max(1, n * (n - 1))


def _sparse(step: Step) -> SparseCode:
    assert isinstance(step.code, SparseCode)  # only a SparseCode has gates, guaranteed by the loss's need
    return step.code


class AuxK:
    """Dead latents rebuild what the others missed (Gao et al. 2024, appendix A.2).

    In each row the `k` dead latents with the largest pre-activations, through a ReLU, are decoded without the bias. The loss is
    their squared error against the detached residual, divided by the residual's variance. It is skipped while no latent is dead.
    """

    def __init__(
        self, *, k: Annotated[int | None, Field(gt=0, description="Dead latents used in each row; half of d_in by default.")] = None
    ) -> None:
        self.k = k

    def active(self, step: Step) -> bool:
        """Whether any latent is dead."""
        return step.dead is not None and step.n_dead > 0

    def __call__(self, step: Step) -> torch.Tensor:
        assert step.dead is not None  # see `active`
        sae, residual = step.sae, step.error.detach()  # [batch, d_out]
        dead = step.dead.nonzero().squeeze(1)  # [n_dead]
        pre = step.code.pre(dead)  # [batch, n_dead]
        k = min(self.k or max(1, sae.d_in // 2), dead.shape[0])
        values, chosen = pre.topk(k, dim=1, sorted=False)  # [batch, k]
        pattern = Pattern.regular(dead[chosen], sae.d_sae)
        no_bias = torch.zeros_like(sae.b_dec)  # [d_out]
        rebuilt = decode_sparse(values.relu().reshape(-1), sae.W_dec, no_bias, pattern)  # [batch, d_out]
        spread = (residual - residual.mean(0)).square().mean()
        return ((residual - rebuilt).square().mean() / spread.clamp_min(1e-12)).nan_to_num(0.0)
