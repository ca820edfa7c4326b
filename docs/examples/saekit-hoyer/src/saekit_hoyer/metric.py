"""The metric `hoyer_sparsity`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from saekit import Step


class HoyerSparsity(Metric):
    """(sqrt(n) - l1 / l2) / (sqrt(n) - 1) of each row's code with n = d_sae latents, averaged (Hoyer, 2004).

    1 where a single latent is active, 0 where all are, and alike. Rows without an active latent have none and are left
    out.
    """

    full_state_update = False
    headline: ClassVar[tuple[str, ...]] = ("hoyer_sparsity",)
    meanings: ClassVar[dict[str, str]] = {"hoyer_sparsity": "1 where one latent is active on an activation, 0 where all are, alike"}
    total: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "rows"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, step: Step) -> None:
        """Take in one held-out batch."""
        l1, l2 = step.code.sum().double(), step.code.square_sum().double().sqrt()  # [batch] each
        some = l2 > 0
        root = step.code.d_sae**0.5
        self.total += ((root - l1[some] / l2[some]) / (root - 1)).sum().cpu()
        self.rows += some.sum().cpu()

    def compute(self) -> dict[str, float | None]:
        """None where no row has an active latent."""
        return {"hoyer_sparsity": float(self.total / self.rows) if self.rows else None}
