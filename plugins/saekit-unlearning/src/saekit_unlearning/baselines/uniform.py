"""Fine-tuning to uniform answers: the two divergences of kl.py, down which a copy of the model's weights goes.

    loss = mean_a KL(p_a || uniform) + weight * sum_kinds mean_t KL(base_t || p_t)

with a over the positions that predict answers of forget texts, t over those of the texts that are to stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from saekit import Subject
from saekit_unlearning.baselines.material import Material, Rows
from saekit_unlearning.baselines.options import Counts, Positives, Weight
from saekit_unlearning.baselines.training import CHECKPOINTS, WEIGHT, Loss, stays, trained
from saekit_unlearning.edited import Edited, model_logits
from saekit_unlearning.kl import forget_kl


@dataclass(frozen=True)
class FineTuning:
    """Every rate is a setting, after each number of steps in `checkpoints`."""

    rates: Positives = (1e-4, 2e-4, 5e-4)
    weight: Weight = WEIGHT
    checkpoints: Counts = CHECKPOINTS
    name: ClassVar[str] = "fine_tuning"

    def settings(self, material: Material, seed: int) -> Iterator[Edited]:
        """The models that it leaves, each with weights of its own."""
        loss = to_uniform(material.site.subject, self.weight)
        for rate in self.rates:
            for step, site in trained(material, seed, loss, rate=rate, checkpoints=self.checkpoints):
                yield Edited(f"rate {rate:g}, {step} steps", site, changed=True)


def to_uniform(base: Subject, weight: float) -> Loss:
    """The loss above."""

    def loss(subject: Subject, forget: Rows, stay: Sequence[Rows]) -> Tensor:
        answers = model_logits(subject, forget.tokens, forget.mask)[forget.answer]  # [m, vocab]
        return forget_kl(answers).mean() + weight * stays(base, subject, stay)

    return loss
