"""The losses `concept` and `concept_rows`: chosen latents should fire where their concepts occur, and nowhere else.

Both act on pre-activations, so that a latent that never fires moves too: through the ReLU its gradient would be zero.
What a latent must exceed to fire differs between gates, rows and latents (the k-th largest pre-activation, a threshold of
its own, zero), so a latent's score is its margin: its pre-activation minus that (`Code.margin`).

`ConceptLatents` and `labelled_scores` are public: other losses on labelled sequences can be built from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from saekit import ComponentError, OptionError, SequenceBatch, Step
from saekit_contrastive.class_contrast import Form, Margin, contrasts, has_both_classes

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

    @property
    def latents(self) -> list[int]:
        """The latent of each concept: c of them."""
        return list(self._latents.values())

    def labels(self, labels: Tensor) -> Tensor:
        """The columns of these concepts, in the order of `latents`: [n, n_concepts] -> [n, c]."""
        return labels[:, list(self._latents)]

    def prepare(self, context: RunContext, first_labels: Iterable[Tensor]) -> None:
        """Find the concepts in the source. UsageError if one is missing, or if a class of it never occurs.

        first_labels: [n, n_concepts] each, labels from the beginning of the training data; read until both classes of
            every concept have occurred."""
        concepts = list(context.source.concepts)
        self._latents = resolve_latents(self._wanted, concepts, context.sae.d_sae)
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


def first_sequence_labels(context: RunContext) -> Iterator[Tensor]:
    """The labels [n, n_concepts] of the first labelled training sequences, batch by batch."""
    for number in range(_LOOKS):
        yield context.source.sequences("train", _LOOK, context.seed, number).labels


def labelled_scores(scores: Tensor, labels: Tensor, batch: SequenceBatch, on: On) -> tuple[Tensor, Tensor]:
    """Scores with their labels, by position (`on` = "tokens") or averaged over each sequence: [r, c] each.

    scores: [m, c], one row for each position of `batch.mask.nonzero()`.
    labels: [n, c], of the sequences."""
    sequence = batch.mask.nonzero()[:, 0]  # [m], of each row of scores
    if on == "tokens":
        return scores, labels[sequence]
    sums = scores.new_zeros(len(batch), scores.shape[1]).index_add(0, sequence, scores)
    counts = batch.mask.sum(1, keepdim=True)  # [n, 1]
    return sums / counts.clamp_min(1), labels.masked_fill(counts == 0, torch.nan)  # a sequence without positions is out


def mean_contrast(scores: Tensor, labels: Tensor, form: Form, margin: float) -> Tensor:
    """The mean of `class_contrast.contrast` over the concepts, for scores and labels [r, c]; 0 if none has both classes."""
    value = contrasts(scores, labels, form=form, margin=margin)
    return scores.sum() * 0.0 if value is None else value


class Concept:
    """On labelled sequences: each position takes its sequence's label, or positions are averaged first.

    The value is the mean over the concepts of `class_contrast.contrast`."""

    def __init__(
        self,
        *,
        latents: Latents = None,
        form: Form = "hinge",
        margin: Margin = 0.5,
        on: On = "tokens",
    ) -> None:
        self._concepts = ConceptLatents(latents)
        self._form, self._margin, self._on = form, margin, on

    def prepare(self, context: RunContext) -> None:
        """Find the concepts in the source, and check that both classes of each occur. UsageError if they do not."""
        self._concepts.prepare(context, first_sequence_labels(context))

    def active(self, step: Step) -> bool:
        """Only if some concept has sequences of both classes."""
        return step.sequences is not None and has_both_classes(self._concepts.labels(step.sequences.labels))

    def __call__(self, step: Step) -> Tensor:
        """The loss of one step's sequences."""
        batch = step.sequences
        assert batch is not None and batch.code is not None  # promised by the need `sequences`
        scores = batch.code.margin(torch.tensor(self._concepts.latents, device=batch.x.device))  # [m, c]
        labelled = labelled_scores(scores, self._concepts.labels(batch.labels), batch, self._on)
        return mean_contrast(*labelled, self._form, self._margin)


class ConceptRows:
    """On the labelled rows of the training batch itself: no further activations are encoded."""

    def __init__(self, *, latents: Latents = None, form: Form = "hinge", margin: Margin = 0.5) -> None:
        self._concepts = ConceptLatents(latents)
        self._form, self._margin = form, margin

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
        scores = step.code.margin(torch.tensor(self._concepts.latents, device=step.x.device))  # [batch, c]
        return mean_contrast(scores, self._concepts.labels(step.labels), self._form, self._margin)
