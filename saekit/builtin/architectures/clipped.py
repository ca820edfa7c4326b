"""Clipped: a ReLU with a cap."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from saekit.builtin.architectures.standard import Standard
from saekit.sae.base import DecoderNorm, Skip


class Clipped(Standard):
    """ReLU clipped at `cap`, the largest activation that a latent can have (as in ReLU6).

    With unit decoder rows, removing the gradient along each row gives the same gradient as normalising the rows in the forward
    pass would, and saves that pass.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        *,
        cap: Annotated[float, Field(gt=0, description="The largest activation a latent can have.")] = 6.0,
        decoder_norm: DecoderNorm = "unit",
        skip: Skip = False,
    ) -> None:
        super().__init__(d_in, d_sae, d_out, decoder_norm=decoder_norm, skip=skip)
        self.cap = cap

    def activation(self, z: Tensor) -> Tensor:
        return z.clamp(0.0, self.cap)

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        super().rescale(scale)
        self.cap /= scale
