"""TopK: the k largest pre-activations of each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from saekit.errors import OptionError
from saekit.sae.base import DecoderNorm, Skip, SparseAutoencoder
from saekit.sae.code import Code
from saekit.sae.kernels import Pattern, row_topk


class TopK(SparseAutoencoder):
    """The k largest pre-activations of each row, through a ReLU (Gao et al. 2024, section 2.3)."""

    saelens_name = "topk"
    known_as = ("sae_lens:topk", "dictionary_learning:AutoEncoderTopK", "sparsify:topk", "sparsify:unnamed")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        *,
        k: Annotated[int, Field(gt=0, description="Latents active in each row.")] = 32,
        decoder_norm: DecoderNorm = "unit",
        skip: Skip = False,
    ) -> None:
        if k > d_sae:
            raise OptionError("k", f"{k} latents cannot be active of d_sae = {d_sae}. Lower k or raise d_sae.")
        super().__init__(d_in, d_sae, d_out, decoder_norm=decoder_norm, skip=skip)
        self.k = k

    def options(self) -> dict[str, Any]:
        return {**super().options(), "k": self.k}

    def gate(self, x: Tensor) -> Code:
        pre = self.dense_pre(x)  # [batch, d_sae]
        pattern = Pattern.regular(row_topk(pre, self.k)[1], self.d_sae)
        return self.sparse_code(x, pattern, self.pre_at(x, pre, pattern).relu())

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        cfg, tensors = super().to_saelens()
        return {**cfg, "k": self.k, "rescale_acts_by_decoder_norm": False}, tensors

    @classmethod
    def options_from_saelens(cls, cfg: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().options_from_saelens(cfg), "k": cfg["k"]}
