"""Representation misdirection (RMU: Li et al. 2024, section 4), at the SAE's site.

    loss = mean_f |h(f) - c u|^2 + alpha * mean_r |h(r) - h_base(r)|^2

with h the activation at the site, f over the positions of forget texts, r over those of texts that are to stay, and u a random
vector of norm 1 whose entries were drawn uniformly from [0, 1). There, three layers' MLPs are trained; here, all weights below
the site but the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit import Subject
from saekit_unlearning.baselines.material import Material, Rows
from saekit_unlearning.baselines.training import CHECKPOINTS, steps, trainable
from saekit_unlearning.edited import Edited, copied, model_logits


@dataclass(frozen=True)
class RMU:
    """Every norm c is a setting, after each number of steps in `checkpoints`.

    norms: c, in units of the mean norm of the activation on forget text.
    """

    norms: Sequence[float] = (1.0, 2.0, 4.0)
    alpha: float = 10.0
    rate: float = 1e-3
    checkpoints: Sequence[int] = CHECKPOINTS
    name: str = "RMU"

    def settings(self, material: Material, seed: int) -> Iterator[Edited]:
        """The models that it leaves, each with weights of its own."""
        base = material.site.subject
        some, _ = next(material.batches(seed))
        with torch.no_grad():
            here = activation(base, some)
        random = torch.rand(here.shape[1], generator=torch.Generator().manual_seed(seed)).to(here)
        toward = random / random.norm() * here.norm(dim=1).mean()  # [d]
        for norm in self.norms:
            site, batches = copied(material.site), material.batches(seed)
            parameters = trainable(site.subject.model)

            def loss(site=site, batches=batches, target=norm * toward) -> Tensor:
                forget, stay = next(batches)
                total = misdirection(activation(site.subject, forget), target)
                for rows in stay:
                    with torch.no_grad():
                        before = activation(base, rows)
                    total = total + self.alpha * misdirection(activation(site.subject, rows), before)
                return total

            for step in steps(parameters, loss, rate=self.rate, checkpoints=self.checkpoints):
                yield Edited(f"norm {norm:g}, {step} steps", copied(site), changed=True)


def misdirection(activation: Tensor, target: Tensor) -> Tensor:
    """The mean squared distance of activations [m, d] from a target [d] or [m, d]."""
    return (activation - target).square().sum(1).mean()


def activation(subject: Subject, rows: Rows) -> Tensor:
    """At the site, at all positions but padding: [m, d], with gradients to the weights below."""
    with subject.lock, subject.site.capture() as captured:
        model_logits(subject, rows.tokens, rows.mask)
        return captured.value[rows.mask]
