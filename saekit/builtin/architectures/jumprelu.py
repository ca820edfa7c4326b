"""JumpReLU: a threshold for each latent, learned by straight-through estimators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from saekit.sae.base import DecoderNorm, Skip, SparseAutoencoder
from saekit.sae.code import Code
from saekit.sae.kernels import Pattern
from saekit.sae.saelens_format import SaeLensFormat


class _Jump(torch.autograd.Function):
    """JumpReLU and its gate at some entries (Rajamanoharan et al. 2024b, eqs. 10 to 12), for z, theta of [nnz].

    Forward: z * H(z - theta), and H(z - theta). Backward, with K the rectangle of width `bandwidth` about theta:
    d jump / d theta = -theta / bandwidth * K, d gate / d theta = -1 / bandwidth * K, d jump / d z = H, d gate / d z = 0.
    """

    @staticmethod
    def forward(ctx, z: Tensor, theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        gate = (z > theta).to(z.dtype)
        ctx.save_for_backward(z, theta, gate)
        ctx.bandwidth = bandwidth
        return z * gate, gate

    @staticmethod
    def backward(ctx, d_jump: Tensor, d_gate: Tensor):
        z, theta, gate = ctx.saved_tensors
        window = ((z - theta).abs() < ctx.bandwidth / 2).to(z.dtype) / ctx.bandwidth
        return d_jump * gate, -(theta * d_jump + d_gate) * window, None


class JumpReLUFormat(SaeLensFormat):
    """Other libraries have a ReLU before the jump, so that a threshold below zero acts as zero."""

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = dict(tensors)
        if "threshold" in state:
            state["threshold"] = state["threshold"].clamp_min(0.0)
        return state


class JumpReLU(SparseAutoencoder):
    """z where z exceeds the latent's threshold, else zero (Rajamanoharan et al. 2024b, Jumping Ahead). Goes with the loss `l0`.

    A threshold learns from entries within half a `bandwidth` of it, whether active or not. The code keeps the inactive ones with
    the value zero, so that the gradient has exactly the support of the estimator. The parameter is the threshold, not its
    logarithm, and is kept from falling below zero, as in sae_lens: Adam moves a logarithm too slowly in a short run.
    """

    interop = JumpReLUFormat(
        "jumprelu",
        transcoder="jumprelu_transcoder",
        skip_transcoder="jumprelu_skip_transcoder",
        known_as=(
            "sae_lens:jumprelu",
            "sae_lens:jumprelu_transcoder",
            "sae_lens:jumprelu_skip_transcoder",
            "dictionary_learning:JumpReluAutoEncoder",
        ),
    )

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        *,
        threshold: Annotated[float, Field(ge=0, description="Every threshold at the start.")] = 0.1,
        bandwidth: Annotated[float, Field(gt=0, description="Width of the window that a threshold learns from.")] = 0.1,
        decoder_norm: DecoderNorm = "unit",
        skip: Skip = False,
    ) -> None:
        super().__init__(d_in, d_sae, d_out, decoder_norm=decoder_norm, skip=skip)
        self.initial_threshold, self.bandwidth = threshold, bandwidth
        self.threshold = nn.Parameter(torch.full((d_sae,), threshold))

    @property
    def latent_parameters(self) -> dict[str, float]:
        return {**super().latent_parameters, "threshold": self.initial_threshold}

    def gate(self, x: Tensor) -> Code:
        pre = self.dense_pre(x)  # [batch, d_sae]
        if not self.training:
            pattern = Pattern.of_mask(pre > self.threshold)
            return self.sparse_code(x, pattern, self.pre_at(x, pre, pattern), threshold=self.threshold)
        pattern = Pattern.of_mask(pre > self.threshold.detach() - self.bandwidth / 2)
        z = self.pre_at(x, pre, pattern)  # [nnz]
        values, gates = _Jump.apply(z, self.threshold[pattern.indices], self.bandwidth)  # [nnz] each
        return self.sparse_code(x, pattern, values, gates, threshold=self.threshold)

    @torch.no_grad()
    def constrain_weights(self) -> None:
        super().constrain_weights()
        self.threshold.clamp_min_(0.0)

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        super().rescale(scale)
        self.threshold.div_(scale)
        self.bandwidth /= scale
