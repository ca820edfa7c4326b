"""The built-in architectures: each states its gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from saekit.errors import OptionError
from saekit.sae.base import DecoderNorm, Skip, SparseAutoencoder
from saekit.sae.code import Code
from saekit.sae.kernels import Pattern, row_topk


class Standard(SparseAutoencoder):
    """ReLU of the pre-activations (Bricken et al. 2023, Towards Monosemanticity); sparse by an `l1` loss.

    Decoder rows are left alone, and `l1` weights each latent by its row's norm, as in Conerly et al. (2024, update of
    April): at equal L0 it rebuilds better here than unit rows do.

    The code begins dense and becomes sparse: it is compressed once fewer than `sparse_below` of its entries are
    active, which is looked at every `look_every` batches. Both ways give the same numbers up to rounding.
    """

    saelens_name, saelens_transcoder, saelens_skip_transcoder = "standard", "transcoder", "skip_transcoder"
    known_as = (
        "sae_lens:standard",
        "sae_lens:transcoder",
        "sae_lens:skip_transcoder",
        "dictionary_learning:AutoEncoder",
        "dictionary_learning:AutoEncoderNew",
    )
    sparse_below = 0.1
    look_every = 16

    def __init__(
        self, d_in: int, d_sae: int, d_out: int | None = None, *, decoder_norm: DecoderNorm = "free", skip: Skip = False
    ) -> None:
        super().__init__(d_in, d_sae, d_out, decoder_norm=decoder_norm, skip=skip)
        self._density, self._batches = 1.0, 0

    def activation(self, z: Tensor) -> Tensor:
        """The gate, elementwise; zero for what is not positive."""
        return z.relu()

    def gate(self, x: Tensor) -> Code:
        if self._density >= self.sparse_below:
            code: Code = self.dense_code(x, self.activation(self.pre_activations(x)))
        else:
            pre = self.dense_pre(x)  # [batch, d_sae]
            pattern = Pattern.of_mask(pre > 0)
            code = self.sparse_code(x, pattern, self.activation(self.pre_at(x, pre, pattern)))
        if self._batches % self.look_every == 0:
            self._density = float(code.count().mean()) / self.d_sae
        self._batches += 1
        return code

    def path_state(self) -> dict[str, Any]:
        return {"density": self._density, "batches": self._batches}

    def load_path_state(self, state: dict[str, Any]) -> None:
        self._density, self._batches = state["density"], state["batches"]


class Clipped(Standard):
    """ReLU clipped at `cap`: no latent can say more than that (as in ReLU6).

    Unit decoder rows with the gradient along each row removed have exactly the gradient that flows through a
    normalisation of the rows, and one pass less.
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

    def options(self) -> dict[str, Any]:
        return {**super().options(), "cap": self.cap}

    def activation(self, z: Tensor) -> Tensor:
        return z.clamp(0.0, self.cap)

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        super().rescale(scale)
        self.cap /= scale


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
