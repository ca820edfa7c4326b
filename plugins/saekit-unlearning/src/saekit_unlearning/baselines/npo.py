"""Negative preference optimisation (Zhang, Lin, Bai and Mei 2024, L_NPO), with the divergence that keeps the rest.

    loss = 2 / beta * mean_i log(1 + (p(y_i | x_i) / base(y_i | x_i)) ** beta) + weight * sum_kinds mean_t KL(base_t || p_t)

with x_i a forget text before its answer y_i. As beta goes to 0 its gradient becomes that of gradient ascent on the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from saekit import Subject
from saekit_unlearning.baselines.material import Material, Rows
from saekit_unlearning.baselines.options import Counts, Positive, Positives, Weight
from saekit_unlearning.baselines.training import CHECKPOINTS, WEIGHT, stays, trained
from saekit_unlearning.edited import Edited, model_logits


@dataclass(frozen=True)
class NPO:
    """Every rate is a setting, after each number of steps in `checkpoints`."""

    rates: Positives = (1e-4, 2e-4, 5e-4)
    beta: Positive = 0.1
    weight: Weight = WEIGHT
    checkpoints: Counts = CHECKPOINTS
    name: ClassVar[str] = "npo"

    def settings(self, material: Material, seed: int) -> Iterator[Edited]:
        """The models that it leaves, each with weights of its own."""
        base = material.site.subject

        def loss(subject: Subject, forget: Rows, stay: Sequence[Rows]) -> Tensor:
            with torch.no_grad():
                before = answer_log_p(base, forget)
            return npo_loss(answer_log_p(subject, forget), before, self.beta) + self.weight * stays(base, subject, stay)

        for rate in self.rates:
            for step, site in trained(material, seed, loss, rate=rate, checkpoints=self.checkpoints):
                yield Edited(f"rate {rate:g}, {step} steps", site, changed=True)


def npo_loss(log_p: Tensor, log_base: Tensor, beta: float) -> Tensor:
    """The first term, of log p(y | x) and log base(y | x) [n]."""
    return -2 / beta * logsigmoid(-beta * (log_p - log_base)).mean()


def answer_log_p(subject: Subject, rows: Rows) -> Tensor:
    """The log-likelihood of each text's answer: [n]."""
    log_p = model_logits(subject, rows.tokens, rows.mask).log_softmax(-1)
    of_tokens = log_p.gather(2, rows.following[..., None])[..., 0]  # [n, T]
    return of_tokens.where(rows.answer, 0.0).sum(1)
