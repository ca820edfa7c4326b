"""The losses `infonce` and `infonce_cluster`: sequences of one kind get similar codes, those of different kinds do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from saekit import OptionError, Step
from saekit_contrastive.class_contrast import has_both_classes
from saekit_contrastive.pooling import Pool, halves, pooled
from saekit_contrastive.tiled import LEFT_OUT, contrastive_loss

if TYPE_CHECKING:
    from saekit import RunContext

Focus = Annotated[list[int], Field(description="Latents that weigh more in the similarity.")]
Emphasis = Annotated[float, Field(gt=0, description="The factor on the activations of `focus`.")]
Positives = Annotated[
    Literal["labels", "halves"],
    Field(
        description="labels: sequences with equal labels are positives; halves: two random halves of one sequence."
    ),
]
Concepts = Annotated[
    list[str] | None, Field(description="The concepts to use; by default all of the source's.")
]
Temperature = Annotated[float, Field(gt=0, description="The divisor of the cosines.")]
Decoupled = Annotated[bool, Field(description="Leave the positives out of the denominator (Yeh et al. 2022).")]
Queue = Annotated[int, Field(ge=0, description="How many codes of earlier steps are also compared with.")]
_LARGEST = 1024  # sequences that `measures` compares
_NO_PARTNER = 1 << 40  # the group of queued codes where only halves of one sequence are positives


@dataclass(kw_only=True, eq=False)
class InfoNCE:
    """The contrastive loss (`tiled.contrastive_loss`) of the cosines of the sequences' pooled codes.

    By labels it is supervised (SupCon, Khosla et al. 2020): each concept defines its own positives among the sequences
    with a known label, and the loss is the mean over the concepts. By halves it is NT-Xent (Chen et al. 2020).
    A sequence with a pooled code of zero has no direction and is left out. Codes of earlier steps in the queue (He et al.
    2020) carry no gradient. The gradient reaches active latents only, so it cannot revive a dead one; `concept` can.
    """

    positives: Positives = "labels"
    concepts: Concepts = None
    pool: Pool = "mean"
    temperature: Temperature = 0.1
    decoupled: Decoupled = False
    focus: Focus = field(default_factory=list)
    emphasis: Emphasis = 10.0
    queue: Queue = 0

    def __post_init__(self) -> None:
        self._by_halves = self.positives == "halves"
        self._columns: list[int] = []
        self._queue: dict[str, Tensor] = {}  # z [q, d_sae] and groups [q, c], the newest last

    def prepare(self, context: RunContext) -> None:
        """Find the concepts in the source. UsageError for a concept, or a latent in `focus`, that does not exist."""
        names = list(context.source.concepts)
        for name in self.concepts or []:
            if name not in names:
                raise OptionError("concepts", f"there is no concept {name!r}. The source has: {', '.join(names)}.")
        self._columns = [names.index(name) for name in (names if self.concepts is None else self.concepts)]
        for latent in self.focus:
            if not 0 <= latent < context.sae.d_sae:
                raise OptionError("focus", f"there is no latent {latent}; there are 0 to {context.sae.d_sae - 1}.")

    def active(self, step: Step) -> bool:
        """Only with something to compare: sequences of both classes of a concept, or two sequences."""
        if step.sequences is None:
            return False
        if self._by_halves:
            return int((step.sequences.mask.sum(1) > 1).sum()) > 1
        return has_both_classes(step.sequences.labels[:, self._columns])

    def __call__(self, step: Step) -> Tensor:
        """The loss of one step's sequences."""
        z, groups = self._of_step(step)
        loss = contrastive_loss(
            z,
            groups,
            temperature=self.temperature,
            decoupled=self.decoupled,
            bank=self._queue["z"].to(z) if self._queue else None,
            bank_groups=self._queue["groups"].to(groups) if self._queue else None,
        )
        self._enqueue(z.detach(), groups)
        return loss

    def measures(self, step: Step) -> dict[str, Tensor]:
        """accuracy, with labels: in how many of the step's sequences that have a positive there the most similar other sequence
        is one. The queue is left out of it."""
        if self._by_halves:  # other halves than the loss has drawn
            return {}
        z, groups = (t[:_LARGEST] for t in self._of_step(step))  # [n, d_sae], [n, c]
        similarity = z @ z.t()  # [n, n]
        right, asked = z.new_zeros(()), 0
        for group in groups.unbind(1):
            known = group != LEFT_OUT  # [n]
            others = known[None, :] & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
            same = (group[None, :] == group[:, None]) & others & known[:, None]  # [n, n]
            has_positive = same.any(1)
            nearest = similarity.masked_fill(~others, -torch.inf).argmax(1, keepdim=True)  # [n, 1]
            right = right + (same.gather(1, nearest)[:, 0] & has_positive).sum()
            asked += int(has_positive.sum())
        return {"accuracy": right / asked} if asked else {}

    def _of_step(self, step: Step) -> tuple[Tensor, Tensor]:
        """Directions of the pooled codes z [n, d_sae], and their groups [n, c], as `contrastive_loss` takes them."""
        batch = step.sequences
        assert batch is not None and batch.code is not None  # promised by the need `sequences`
        n, sequence = len(batch), batch.mask.nonzero()[:, 0]  # [m], of each row of the code
        if self._by_halves:
            codes = pooled(batch.code, sequence + n * halves(sequence), 2 * n, self.pool)  # [2n, d_sae]
            groups = torch.arange(n, device=sequence.device).repeat(2)[:, None]  # [2n, 1]
        else:
            codes = pooled(batch.code, sequence, n, self.pool)  # [n, d_sae]
            groups = _label_groups(batch.labels[:, self._columns])  # [n, c]
        z, silent = _directions(self._weighted(codes, step))
        return z, groups.masked_fill(silent[:, None], LEFT_OUT)

    def _chosen(self, step: Step) -> list[int]:
        """The latents that weigh more."""
        return self.focus

    def _weighted(self, codes: Tensor, step: Step) -> Tensor:
        chosen = self._chosen(step)
        if not chosen:
            return codes
        weights = codes.new_ones(codes.shape[1])
        weights[chosen] = self.emphasis
        return codes * weights

    # --- the queue --------------------------------------------------------------------------------------------------

    def _enqueue(self, z: Tensor, groups: Tensor) -> None:
        if not self.queue:
            return
        if self._by_halves:  # a half's partner is in its own step
            groups = torch.where(groups == LEFT_OUT, groups, torch.full_like(groups, _NO_PARTNER))
        for name, new in (("z", z), ("groups", groups)):
            old = self._queue.get(name)
            whole = new if old is None else torch.cat([old.to(new), new])
            self._queue[name] = whole[-self.queue :].clone()

    def state_dict(self) -> dict[str, Tensor]:
        """The queue."""
        return dict(self._queue)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the queue."""
        self._queue = dict(state)


@dataclass(kw_only=True, eq=False)
class InfoNCECluster(InfoNCE):
    """`InfoNCE` in which the neighbours of the `focus` latents in the feature graph weigh as much as these latents."""

    focus: Focus = field(default_factory=lambda: [0])

    def active(self, step: Step) -> bool:
        """Not before there is a graph."""
        return step.graph is not None and super().active(step)

    def _chosen(self, step: Step) -> list[int]:
        assert step.graph is not None  # see `active`
        near = torch.cat([step.graph.neighbours(latent)[0] for latent in self.focus])
        return sorted({*self.focus, *near.tolist()})


def _label_groups(labels: Tensor) -> Tensor:
    """Labels [n, c] as groups, with `LEFT_OUT` for NaN: [n, c]."""
    return torch.where(labels.isnan(), torch.full_like(labels, LEFT_OUT), (labels > 0.5).to(labels)).long()


def _directions(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, d_sae] scaled to norm 1, and which of them are zero [n]; those stay zero."""
    return functional.normalize(codes, dim=1), ~codes.detach().any(1)
