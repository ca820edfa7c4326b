"""Standard: a ReLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saekit.sae.base import DecoderNorm, Skip, SparseAutoencoder
from saekit.sae.code import Code
from saekit.sae.kernels import Pattern
from saekit.sae.saelens_format import SaeLensFormat


class Standard(SparseAutoencoder):
    """ReLU of the pre-activations (Bricken et al. 2023, Towards Monosemanticity). An `l1` loss makes the code sparse.

    Decoder rows are left alone, and `l1` weights each latent by its row's norm, as in Conerly et al. (2024, update of April):
    at equal L0 this reconstructs better here than unit rows do.

    The code starts dense and becomes sparse. It is held as a `SparseCode` once a share of less than `sparse_below` of its
    entries is active, which is measured every `look_every` batches. Both ways give the same numbers up to rounding.
    """

    interop = SaeLensFormat(
        "standard",
        transcoder="transcoder",
        skip_transcoder="skip_transcoder",
        known_as=(
            "sae_lens:standard",
            "sae_lens:transcoder",
            "sae_lens:skip_transcoder",
            "dictionary_learning:AutoEncoder",
            "dictionary_learning:AutoEncoderNew",
        ),
    )
    sparse_below = 0.1
    look_every = 16

    def __init__(
        self, d_in: int, d_sae: int, d_out: int | None = None, *, decoder_norm: DecoderNorm = "free", skip: Skip = False
    ) -> None:
        super().__init__(d_in, d_sae, d_out, decoder_norm=decoder_norm, skip=skip)
        self._density, self._batches = 1.0, 0

    def activation(self, z: Tensor) -> Tensor:
        """The gate, entry by entry. Zero wherever z is not positive."""
        return z.relu()

    def gate(self, x: Tensor) -> Code:
        if self._density >= self.sparse_below:
            code: Code = self.dense_code(x, self.activation(self.pre_activations(x)), threshold=0.0)  # [batch, d_sae]
        else:
            pre = self.dense_pre(x)  # [batch, d_sae]
            pattern = Pattern.of_mask(pre > 0)
            values = self.activation(self.pre_at(x, pre, pattern))  # [nnz] active
            code = self.sparse_code(x, pattern, values, threshold=0.0)
        if self._batches % self.look_every == 0:
            self._density = float(code.count().mean()) / self.d_sae
        self._batches += 1
        return code

    def path_state(self) -> dict[str, Any]:
        return {"density": self._density, "batches": self._batches}

    def load_path_state(self, state: dict[str, Any]) -> None:
        self._density, self._batches = state["density"], state["batches"]
