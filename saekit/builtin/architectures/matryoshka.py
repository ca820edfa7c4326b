"""Matryoshka: BatchTopK with nested dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from saekit.builtin.architectures.batchtopk import BatchTopK, BatchTopKFormat, MeanActive, ThresholdMemory
from saekit.errors import OptionError
from saekit.sae.base import DecoderNorm, Skip
from saekit.sae.code import SparseCode
from saekit.sae.kernels import Pattern, decode_sparse


class MatryoshkaFormat(BatchTopKFormat):
    """As batchtopk's, with the sizes of the nested dictionaries."""

    def options(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().options(cfg), "prefixes": cfg["matryoshka_widths"]}

    def keys(self, sae: Any) -> dict[str, Any]:
        return {**super().keys(sae), "matryoshka_widths": sae.prefixes}


class Matryoshka(BatchTopK):
    """BatchTopK whose first latents reconstruct the input on their own (Bussmann, Nabeshima, Karvonen and Nanda 2025).

    `prefixes` are the sizes of the nested dictionaries. The loss `matryoshka` is the error of all their reconstructions.
    """

    interop = MatryoshkaFormat(
        "jumprelu",
        transcoder="jumprelu_transcoder",
        skip_transcoder="jumprelu_skip_transcoder",
        known_as=("sae_lens:matryoshka_batchtopk", "dictionary_learning:MatryoshkaBatchTopKSAE"),
    )

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        *,
        k: MeanActive = 32,
        prefixes: Annotated[
            list[int] | None,
            Field(description="Sizes of the nested dictionaries; by default d_sae / 16, / 8, / 4, / 2 and d_sae."),
        ] = None,
        threshold_memory: ThresholdMemory = 0.99,
        decoder_norm: DecoderNorm = "unit",
        skip: Skip = False,
    ) -> None:
        super().__init__(
            d_in, d_sae, d_out, k=k, threshold_memory=threshold_memory, decoder_norm=decoder_norm, skip=skip
        )
        sizes = prefixes or sorted({max(1, d_sae // part) for part in (16, 8, 4, 2, 1)})
        if sizes != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] > d_sae:
            raise OptionError("prefixes", f"{sizes} must rise, from 1 at least to d_sae = {d_sae} at most.")
        self.prefixes = sizes if sizes[-1] == d_sae else [*sizes, d_sae]

    def nested_reconstructions(self, code: SparseCode) -> Tensor:
        """What each prefix of the dictionary rebuilds, without `skip`: [len(prefixes), batch, d_out].

        Each entry is decoded once, into the sum of its ring (the latents that a prefix adds to the one before). The prefixes
        are the running sums of the rings."""
        pattern = code.pattern
        bounds = torch.tensor(self.prefixes, device=pattern.indices.device)
        ring = torch.bucketize(pattern.indices, bounds, right=True)  # [nnz], the ring of each entry's latent
        bag = pattern.rows * len(self.prefixes) + ring  # [nnz]
        order = bag.argsort(stable=True)
        rings = Pattern.of_rows(bag[order], pattern.indices[order], len(code) * len(self.prefixes), self.d_sae)
        sums = decode_sparse(code.values[order], self.W_dec, torch.zeros_like(self.b_dec), rings)  # [batch * prefixes, d_out]
        return sums.view(len(code), len(self.prefixes), self.d_out).transpose(0, 1).cumsum(0) + self.b_dec
