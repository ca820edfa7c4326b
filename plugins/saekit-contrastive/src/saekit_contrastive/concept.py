"""The losses `concept` and `concept_rows`: chosen latents should fire where their concepts occur, and nowhere else.

Both act on pre-activations, so that a latent that never fires moves too: through the ReLU its gradient would be zero, which
is what `form = "activation"` is there to show.
What a latent must exceed to fire differs between gates, rows and latents (the k-th largest pre-activation, a threshold of
its own, zero), so a latent's score is its margin: its pre-activation minus that (`Code.margin`).

`ConceptLatents`, `labels_by` and `scores_by` are public: other losses on labelled sequences can be built from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from saekit import ComponentError, OptionError, SequenceBatch, Step
from saekit_contrastive.class_contrast import Form, Margin, contrasts, has_both_classes, scores_of

if TYPE_CHECKING:
    from saekit import RunContext

Latents = Annotated[
    dict[str, int] | None,
    Field(
        description="The latent of each concept, as in {code = 0}: the name or number of a concept; by default the first latents."
    ),
]
"""The type of the option that gives each concept its latent."""
On = Annotated[
    Literal["tokens", "sequences"],
    Field(description="tokens: the loss separates positions; sequences: it separates means over positions."),
]
"""The type of the option `on`."""
Shuffled = Annotated[
    bool, Field(description="A control: the labels are permuted at random, anew in each step.")
]
"""The type of the option `shuffled`."""
_LOOK, _LOOKS = 32, 16  # how far `prepare` looks for both classes: sequences a batch, and batches


def resolve_latents(latents: dict[str, int] | None, concepts: list[str], d_sae: int) -> dict[int, int]:
    """{column of labels: latent}. By default column i gets latent i.

    concepts: the names of the columns.

    OptionError for a concept or a latent that does not exist, and for one that is given twice."""
    if not concepts:
        raise ComponentError("the source has no concepts. Give it labels.")
    if latents is None:
        latents = {name: number for number, name in enumerate(concepts)}
    found: dict[int, int] = {}
    for name, latent in latents.items():
        column = concepts.index(name) if name in concepts else int(name) if name.isdigit() else -1
        if not 0 <= column < len(concepts):
            raise OptionError("latents", f"there is no concept {name!r}. The source has: {', '.join(concepts)}.")
        if not 0 <= latent < d_sae:
            raise OptionError("latents", f"{name!r} is given latent {latent}, but there are 0 to {d_sae - 1}.")
        if column in found or latent in found.values():
            raise OptionError("latents", f"{name!r} = {latent} names a concept or a latent twice. Give each its own.")
        found[column] = latent
    if not found:
        raise OptionError("latents", "is empty. Name a concept and its latent, or leave it out.")
    return found


class ConceptLatents:
    """Which latent stands for which concept of the source, resolved by `prepare`.

    wanted: the option `latents`.
    """

    def __init__(self, wanted: dict[str, int] | None) -> None:
        self._wanted = wanted
        self._latents: dict[int, int] = {}
        self._names: list[str] = []

    @property
    def latents(self) -> list[int]:
        """The latent of each concept: c of them."""
        return list(self._latents.values())

    @property
    def endings(self) -> list[str]:
        """What the names of each concept's values end in: nothing if there is only one concept."""
        return [f"_{name}".replace(" ", "_") if len(self._latents) > 1 else "" for name in self._names]

    def labels(self, labels: Tensor) -> Tensor:
        """The columns of these concepts, in the order of `latents`: [n, n_concepts] -> [n, c]."""
        return labels[:, list(self._latents)]

    def prepare(self, context: RunContext, first_labels: Iterable[Tensor]) -> None:
        """Find the concepts in the source. UsageError if one is missing, or if a class of it never occurs.

        first_labels: [n, n_concepts] each, labels from the beginning of the training data; read until both classes of
            every concept have occurred."""
        concepts = list(context.source.concepts)
        self._latents = resolve_latents(self._wanted, concepts, context.sae.d_sae)
        self._names = [concepts[column] for column in self._latents]
        seen = None
        for labels in first_labels:
            chosen = self.labels(labels)
            now = torch.stack([(chosen > 0.5).any(0), (chosen <= 0.5).any(0)])  # [2, c]
            seen = now if seen is None else seen | now
            if bool(seen.all()):
                return
        for place, column in enumerate(self._latents):
            if seen is None or not bool(seen[:, place].all()):
                raise ComponentError(
                    f"the first training data do not have concept {concepts[column]!r} as both 0 and 1, "
                    "so there is nothing to tell apart. Give the source data of both classes."
                )


def first_sequence_labels(context: RunContext, on: On) -> Iterator[Tensor]:
    """`labels_by` of the first labelled training sequences, batch by batch."""
    for number in range(_LOOKS):
        yield labels_by(context.source.sequences("train", _LOOK, context.seed, number), on)


def labels_by(batch: SequenceBatch, on: On, shuffled: bool = False) -> Tensor:
    """The labels by position of `batch.mask.nonzero()` (`on` = "tokens"), or of each sequence: [r, n_concepts].

    A sequence without positions has none. shuffled: in a random order, in which the positions of a sequence stay together if
    they have their sequence's labels."""
    if on == "tokens" and batch.position_labels is not None:
        labels = batch.labels_of_positions()
        return permuted(labels) if shuffled else labels
    labels = permuted(batch.labels) if shuffled else batch.labels
    if on == "tokens":
        return labels[batch.mask.nonzero()[:, 0]]
    return labels.masked_fill(~batch.mask.any(1, keepdim=True), torch.nan)


def scores_by(scores: Tensor, batch: SequenceBatch, on: On) -> Tensor:
    """Scores [m, c] of the positions of `batch.mask.nonzero()` (`on` = "tokens"), or their mean over each sequence: [r, c]."""
    if on == "tokens":
        return scores
    sequence = batch.mask.nonzero()[:, 0]  # [m], of each row of scores
    sums = scores.new_zeros(len(batch), scores.shape[1]).index_add(0, sequence, scores)
    return sums / batch.mask.sum(1, keepdim=True).clamp_min(1)


def permuted(labels: Tensor) -> Tensor:
    """Labels [n, c] with their rows in a random order, drawn on the CPU so that every device draws the same."""
    return labels[torch.randperm(len(labels)).to(labels.device)]


def mean_contrast(scores: Tensor, labels: Tensor, form: Form, margin: float) -> Tensor:
    """The mean of `class_contrast.contrast` over the concepts, for scores and labels [r, c]; 0 if none has both classes."""
    value = contrasts(scores, labels, form=form, margin=margin)
    return scores.sum() * 0.0 if value is None else value


def measures_of_latents(activations: Tensor, labels: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The scalars of one step's latents, for activations and labels [r, c]; `names` end them, one for each column.

    e_pos, e_neg: the mean activation over the rows of each class. firing_pos, firing_neg: the share of them that fire. A class
    without rows is left out."""
    found = {}
    for f, y, name in zip(activations.unbind(1), labels.unbind(1), names, strict=True):
        for of, rows in (("pos", f[y > 0.5]), ("neg", f[y <= 0.5])):
            if len(rows):
                found[f"e_{of}{name}"] = rows.mean()
                found[f"firing_{of}{name}"] = (rows != 0).to(rows).mean()
    return found


class Concept:
    """On labelled sequences: each position has its label (its sequence's, unless spans say more), or positions are averaged first.

    The value is the mean over the concepts of `class_contrast.contrast`."""

    def __init__(
        self,
        *,
        latents: Latents = None,
        form: Form = "hinge",
        margin: Margin = 0.5,
        on: On = "tokens",
        shuffled: Shuffled = False,
    ) -> None:
        self._concepts = ConceptLatents(latents)
        self._form, self._margin, self._on, self._shuffled = form, margin, on, shuffled

    def prepare(self, context: RunContext) -> None:
        """Find the concepts in the source, and check that both classes of each occur. UsageError if they do not."""
        self._concepts.prepare(context, first_sequence_labels(context, self._on))

    def active(self, step: Step) -> bool:
        """Only if some concept has positions, or sequences, of both classes."""
        return step.sequences is not None and has_both_classes(self._concepts.labels(labels_by(step.sequences, self._on)))

    def __call__(self, step: Step) -> Tensor:
        """The loss of one step's sequences."""
        batch = step.sequences
        assert batch is not None and batch.code is not None  # promised by the need `sequences`
        scores = scores_of(batch.code, torch.tensor(self._concepts.latents, device=batch.x.device), self._form)  # [m, c]
        labels = self._concepts.labels(labels_by(batch, self._on, self._shuffled))  # [r, c]
        return mean_contrast(scores_by(scores, batch, self._on), labels, self._form, self._margin)

    def measures(self, step: Step) -> dict[str, Tensor]:
        """`measures_of_latents` over the positions of the step's sequences, by their true labels."""
        batch = step.sequences
        assert batch is not None and batch.code is not None  # promised by the need `sequences`
        activations = batch.code.columns(torch.tensor(self._concepts.latents, device=batch.x.device))  # [m, c]
        labels = self._concepts.labels(batch.labels_of_positions())  # [m, c]
        return measures_of_latents(activations, labels, self._concepts.endings)


class ConceptRows:
    """On the labelled rows of the training batch itself: no further activations are encoded."""

    def __init__(
        self, *, latents: Latents = None, form: Form = "hinge", margin: Margin = 0.5, shuffled: Shuffled = False
    ) -> None:
        self._concepts = ConceptLatents(latents)
        self._form, self._margin, self._shuffled = form, margin, shuffled

    def prepare(self, context: RunContext) -> None:
        """Find the concepts in the source, and check that both classes of each occur. UsageError if they do not."""
        self._concepts.prepare(context, self._first_labels(context))

    def _first_labels(self, context: RunContext) -> Iterator[Tensor]:
        for batch in context.training_activations(_LOOKS * context.config.training.batch_size):
            assert batch.labels is not None  # promised by the need `labels`
            yield batch.labels

    def active(self, step: Step) -> bool:
        """Only if some concept has rows of both classes."""
        return step.labels is not None and has_both_classes(self._concepts.labels(step.labels))

    def __call__(self, step: Step) -> Tensor:
        """The loss of one batch."""
        assert step.labels is not None  # promised by the need `labels`
        scores = scores_of(step.code, torch.tensor(self._concepts.latents, device=step.x.device), self._form)  # [batch, c]
        labels = self._concepts.labels(step.labels)  # [batch, c]
        return mean_contrast(scores, permuted(labels) if self._shuffled else labels, self._form, self._margin)

    def measures(self, step: Step) -> dict[str, Tensor]:
        """`measures_of_latents` over the rows of the batch, by their true labels."""
        assert step.labels is not None  # promised by the need `labels`
        activations = step.code.columns(torch.tensor(self._concepts.latents, device=step.x.device))  # [batch, c]
        return measures_of_latents(activations, self._concepts.labels(step.labels), self._concepts.endings)
