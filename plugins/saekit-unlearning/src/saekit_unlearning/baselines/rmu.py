"""Representation misdirection (RMU: Li et al. 2024, section 4), at the SAE's site.

    loss = mean_f |h(f) - c u|^2 + alpha * mean_r |h(r) - h_base(r)|^2

with h the activation at the site, f over the positions of forget texts, r over those of texts that are to stay, and u a random
vector of norm 1 whose entries were drawn uniformly from [0, 1). There, the MLPs of three blocks are trained; here, all weights
below the site but the embeddings, or the MLPs of some blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from saekit import Subject, UsageError
from saekit_unlearning.baselines.material import Material, Rows
from saekit_unlearning.baselines.options import Counts, Number, Positive, Positives, Weight
from saekit_unlearning.baselines.training import CHECKPOINTS, all_weights, trained
from saekit_unlearning.edited import Edited, copied, model_logits
from saekit_unlearning.passages import Site


@dataclass(frozen=True)
class RMU:
    """Every norm c is a setting, after each number of steps in `checkpoints`.

    norms: c, in units of the mean norm of the activation on forget text.
    blocks: train the MLPs of so many blocks, the site's and those below it, as there; None for all weights below the site.
    """

    norms: Positives = (1.0, 2.0, 4.0)
    alpha: Weight = 10.0
    rate: Positive = 3e-4
    blocks: Number | None = None
    checkpoints: Counts = CHECKPOINTS
    name: ClassVar[str] = "rmu"

    def settings(self, material: Material, seed: int) -> Iterator[Edited]:
        """The models that it leaves, each with weights of its own."""
        base = material.site.subject
        some, _ = next(material.batches(seed))
        with torch.no_grad():
            here = activation(base, some)
        random = torch.rand(here.shape[1], generator=torch.Generator().manual_seed(seed)).to(here)
        toward = random / random.norm() * here.norm(dim=1).mean()  # [d]
        for norm in self.norms:

            def loss(subject: Subject, forget: Rows, stay: Sequence[Rows], target: Tensor = norm * toward) -> Tensor:
                total = misdirection(activation(subject, forget), target)
                for rows in stay:
                    with torch.no_grad():
                        before = activation(base, rows)
                    total = total + self.alpha * misdirection(activation(subject, rows), before)
                return total

            for step, site in trained(
                material, seed, loss, rate=self.rate, checkpoints=self.checkpoints, begin=self._begin
            ):
                yield Edited(f"norm {norm:g}, {step} steps", site, changed=True)

    def _begin(self, site: Site) -> tuple[Sequence[nn.Parameter], Callable[[], Site]]:
        if self.blocks is None:
            return all_weights(site)
        parameters = mlp_weights(site.subject, self.blocks)
        return parameters, lambda: copied(site, parameters)


def misdirection(activation: Tensor, target: Tensor) -> Tensor:
    """The mean squared distance of activations [m, d] from a target [d] or [m, d]."""
    return (activation - target).square().sum(1).mean()


def mlp_weights(subject: Subject, number: int) -> list[nn.Parameter]:
    """Those of the MLPs of the block that has the site and of those before it, `number` in all, now with gradients.

    UsageError if the site is in no block, or they have no submodule called mlp."""
    at = subject.site.module
    lists = [some for some in subject.model.modules() if isinstance(some, nn.ModuleList)]
    place = next(((some, i) for some in lists for i, block in enumerate(some) if at in block.modules()), None)
    blocks, last = place if place is not None else ((), -1)
    if place is not None and blocks[last] is at and subject.site.side == "input":
        last -= 1
    mlps = [getattr(block, "mlp", None) for block in blocks[max(last + 1 - number, 0) : last + 1]]
    found = [p for mlp in mlps if isinstance(mlp, nn.Module) for p in mlp.parameters()]
    if not found:
        raise UsageError(
            f"baselines.rmu.blocks = {number}: no block up to {subject.site.name!r} has a part called mlp. Leave blocks out to "
            "train all weights below the site."
        )
    for p in found:
        p.requires_grad_(True)
    return found


def activation(subject: Subject, rows: Rows) -> Tensor:
    """At the site, at all positions but padding: [m, d], with gradients to the weights below."""
    with subject.lock, subject.site.capture() as captured:
        model_logits(subject, rows.tokens, rows.mask)
        return captured.value[rows.mask]
