"""The built-in architectures: each states its gate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from saekit.errors import UsageError
from saekit.sae.base import SparseAutoencoder
from saekit.sae.code import Code
from saekit.sae.kernels import Pattern

DecoderNorm = Annotated[
    Literal["unit", "free"], Field(description="unit: decoder rows are kept at norm 1; free: left alone.")
]


class Standard(SparseAutoencoder):
    """ReLU of the pre-activations (Bricken et al. 2023, Towards Monosemanticity); sparse by an `l1` loss."""

    saelens_name = "standard"

    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None, *, decoder_norm: DecoderNorm = "unit") -> None:
        super().__init__(d_in, d_sae, d_out, decoder_norm=decoder_norm)

    def gate(self, x: Tensor, centred: Tensor) -> Code:
        return self.dense_code(x, torch.addmm(self.b_enc, centred, self.W_enc).relu())  # [batch, d_sae]


class TopK(SparseAutoencoder):
    """The k largest pre-activations of each row, through a ReLU (Gao et al. 2024, section 2.3)."""

    saelens_name = "topk"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        *,
        k: Annotated[int, Field(gt=0, description="Latents active in each row.")] = 32,
        decoder_norm: DecoderNorm = "unit",
    ) -> None:
        if k > d_sae:
            raise UsageError(f"architecture.k: {k} latents cannot be active of d_sae = {d_sae}. Lower k or raise d_sae.")
        super().__init__(d_in, d_sae, d_out, decoder_norm=decoder_norm)
        self.k = k

    def options(self) -> dict[str, Any]:
        return {**super().options(), "k": self.k}

    def gate(self, x: Tensor, centred: Tensor) -> Code:
        pre = self.dense_pre(centred)  # [batch, d_sae]
        pattern = Pattern.regular(pre.topk(self.k, dim=1, sorted=False).indices, self.d_sae)
        return self.sparse_code(x, pattern, self.pre_at(centred, pre, pattern).relu())

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        cfg, tensors = super().to_saelens()
        return {**cfg, "k": self.k, "rescale_acts_by_decoder_norm": False}, tensors
