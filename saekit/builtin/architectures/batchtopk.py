"""BatchTopK: the k largest pre-activations per row on average, chosen over the whole batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from saekit.errors import OptionError
from saekit.sae.base import DecoderNorm, Skip, SparseAutoencoder
from saekit.sae.code import Code
from saekit.sae.kernels import Pattern, row_topk
from saekit.sae.saelens_format import SaeLensFormat

MeanActive = Annotated[int, Field(gt=0, description="Latents active in each row, on average.")]
ThresholdMemory = Annotated[
    float, Field(ge=0, lt=1, description="How much of the running threshold stays from step to step.")
]


class BatchTopKFormat(SaeLensFormat):
    """Written as a jumprelu with one threshold for all latents, which is what it computes at inference; read from an SAE that
    was saved in training, which still has `k`."""

    def options(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        options = {**super().options(cfg), "k": cfg["k"]}
        if "topk_threshold_lr" in cfg:
            options["threshold_memory"] = 1.0 - cfg["topk_threshold_lr"]
        return options

    def keys(self, sae: Any) -> dict[str, Any]:
        return {"k": sae.k}

    def to(self, sae: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        cfg, tensors = super().to(sae)
        return cfg, {**tensors, "threshold": sae.threshold.clamp_min(0.0).expand(sae.d_sae)}  # [d_sae]

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = dict(tensors)
        if "topk_threshold" in state:  # the name in training
            state["threshold"] = state.pop("topk_threshold")
        if "threshold" in state and state["threshold"].numel():  # one for each latent, all equal
            state["threshold"] = state["threshold"].reshape(-1)[0].clone()
        return state


class BatchTopK(SparseAutoencoder):
    """The k * batch largest pre-activations of a batch, through a ReLU (Bussmann, Leask and Nanda 2024).

    At inference a row's code must not depend on the other rows, so a latent is active if it exceeds `threshold`. In training
    that is the running mean of the smallest activation that each batch kept, which lags behind weights that still move; at
    the end of training it is set so that k latents are active on average on a sample of training activations.
    """

    interop = BatchTopKFormat(
        "jumprelu",
        transcoder="jumprelu_transcoder",
        skip_transcoder="jumprelu_skip_transcoder",
        known_as=("sae_lens:batchtopk", "dictionary_learning:BatchTopKSAE"),
    )
    l0_option = "k"
    candidates = 4
    """The largest `candidates * k` entries of each row are searched first, and the whole batch only if that could miss one."""

    threshold: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        *,
        k: MeanActive = 32,
        threshold_memory: ThresholdMemory = 0.99,
        decoder_norm: DecoderNorm = "unit",
        skip: Skip = False,
    ) -> None:
        if k > d_sae:
            raise OptionError("k", f"{k} latents cannot be active of d_sae = {d_sae}. Lower k or raise d_sae.")
        super().__init__(d_in, d_sae, d_out, decoder_norm=decoder_norm, skip=skip)
        self.k, self.threshold_memory = k, threshold_memory
        self.register_buffer("threshold", torch.tensor(-1.0))  # below zero: no batch has been seen

    def gate(self, x: Tensor) -> Code:
        pre = self.dense_pre(x)  # [batch, d_sae]
        if self.training:
            pattern = self._largest_of_batch(pre)
            values = self.pre_at(x, pre, pattern).relu()
            threshold = values.detach().amin()  # that of this batch
            self._follow(values.detach())
        else:
            threshold = self.threshold.clamp_min(0.0)
            pattern = Pattern.of_mask(pre > threshold)
            values = self.pre_at(x, pre, pattern)
        return self.sparse_code(x, pattern, values, threshold=threshold)

    @torch.no_grad()
    def _largest_of_batch(self, pre: Tensor) -> Pattern:
        """The k * batch largest entries, found among the largest of each row if that is exact."""
        batch, wanted = pre.shape[0], self.k * pre.shape[0]
        width = min(self.candidates * self.k, self.d_sae)
        values, latents = row_topk(pre, width)  # [batch, width]
        chosen = values.reshape(-1).topk(wanted, sorted=False).indices  # [wanted]
        rows = chosen.div(width, rounding_mode="floor")
        full_rows = torch.bincount(rows, minlength=batch) == width
        if width < self.d_sae and bool(full_rows.any()):  # such a row may hold more of the largest
            chosen = pre.reshape(-1).topk(wanted, sorted=False).indices.sort().values
            return Pattern.of_rows(chosen // self.d_sae, chosen % self.d_sae, batch, self.d_sae)
        chosen = chosen.sort().values
        return Pattern.of_rows(chosen // width, latents.reshape(-1)[chosen], batch, self.d_sae)

    @torch.no_grad()
    def _follow(self, values: Tensor) -> None:
        """Move the threshold towards the smallest activation of this batch, without waiting for the device."""
        positive = torch.where(values > 0, values, torch.inf)
        smallest = positive.min()
        smallest = torch.where(torch.isfinite(smallest), smallest, self.threshold)
        moved = torch.lerp(smallest, self.threshold, self.threshold_memory)
        self.threshold.copy_(torch.where(self.threshold < 0, smallest, moved))

    @torch.no_grad()
    def calibrate(self, batches: Iterator[Tensor]) -> dict[str, float]:
        """Set `threshold` so that k latents are active on average on `batches`, or as many as are positive if those are fewer.

        It is the (k * rows + 1)-th largest pre-activation of all. Memory: `candidates` * k numbers for each row. The result is
        exact unless the first batches hold more than `candidates` times their share of the largest."""
        rows, largest = 0, self.W_dec.new_empty(0)
        for x in batches:
            rows += len(x)
            largest = torch.cat([largest, self._positive(x)])
            kept = self.candidates * self.k * rows + 1
            if len(largest) > kept:
                largest = largest.topk(kept, sorted=False).values
        if not rows:
            return {}
        wanted = self.k * rows
        threshold = largest.topk(wanted + 1).values[-1] if len(largest) > wanted else largest.new_zeros(())
        self.threshold.copy_(threshold)
        return {"threshold": float(threshold)}

    def _positive(self, x: Tensor) -> Tensor:
        """The pre-activations above zero of x [n, d_in]: [m]."""
        pre = self.dense_pre(x)
        return pre[pre > 0]

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        super().rescale(scale)
        self.threshold.div_(scale)
