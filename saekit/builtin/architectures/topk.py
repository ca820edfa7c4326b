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
from saekit.sae.saelens_format import SaeLensFormat


class TopKFormat(SaeLensFormat):
    """Every library keeps `k`."""

    def options(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().options(cfg), "k": cfg["k"]}

    def keys(self, sae: Any) -> dict[str, Any]:
        return {"k": sae.k}

    def to(self, sae: SparseAutoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
        cfg, tensors = super().to(sae)
        return {**cfg, **self.keys(sae), "rescale_acts_by_decoder_norm": False}, tensors


class TopK(SparseAutoencoder):
    """The k largest pre-activations of each row, through a ReLU (Gao et al. 2024, section 2.3)."""

    interop = TopKFormat(
        "topk",
        known_as=("sae_lens:topk", "dictionary_learning:AutoEncoderTopK", "sparsify:topk", "sparsify:unnamed"),
    )
    l0_option = "k"

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

    def gate(self, x: Tensor) -> Code:
        pre = self.dense_pre(x)  # [batch, d_sae]
        latents = row_topk(pre, self.k)[1]  # [batch, k]
        pattern = Pattern.regular(latents, self.d_sae)
        values = self.pre_at(x, pre, pattern).relu()  # [batch * k]
        return self.sparse_code(x, pattern, values, threshold=values.detach().view(-1, self.k).amin(1, keepdim=True))
