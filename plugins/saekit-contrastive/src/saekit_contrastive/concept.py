"""Losses `concept` and `concept_rows`: chosen latents are to fire where their concepts are, and nowhere else.

They act on pre-activations, so that a latent that never fires moves too: through the ReLU its gradient would be zero.
What a latent must exceed to fire differs between gates and rows (the k-th largest pre-activation, a threshold, zero), so a
score is the pre-activation less the row's *bar*, its smallest activation that passed the gate (held fixed).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from saekit import Code, ComponentError, OptionError, Step
from saekit_contrastive.class_contrast import Form, Margin, contrasts, has_both

if TYPE_CHECKING:
    from saekit import RunContext

Latents = Annotated[
    dict[str, int] | None,
    Field(
        description="The latent of each concept: {code = 0}, a name or a number of the source's; the first ones by default."
    ),
]
"""The type of the option that gives each concept its latent."""
On = Annotated[
    Literal["tokens", "sequences"],
    Field(description="tokens: every position is to be told apart; sequences: only the mean over positions."),
]
"""The type of the option `on`."""
_LOOK, _LOOKS = 32, 16  # how far `prepare` looks for both classes: sequences a batch, and batches


def resolve_latents(latents: dict[str, int] | None, concepts: list[str], d_sae: int) -> dict[int, int]:
    """{column of labels: latent}. By default column i belongs to latent i.

    concepts: the names of the columns. OptionError for an unknown concept, an unknown latent, and a latent given twice."""
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


def bar(code: Code) -> Tensor:
    """What a latent must exceed to be among the active of each row: its smallest activation there, without gradient: [batch].

    Zero where nothing is active. For topk it is the k-th largest pre-activation, for a plain ReLU nearly zero."""
    rows, _, values = code.nonzero()
    found = values.new_zeros(len(code))
    return found.scatter_reduce_(0, rows, values.detach(), "amin", include_self=False)


class _Concept:
    """What the two losses share: which latents, which form."""

    def __init__(self, latents: dict[str, int] | None, form: Form, margin: float) -> None:
        self._latents, self._form, self._margin = latents, form, margin
        self._chosen: dict[int, int] = {}

    def prepare(self, context: RunContext) -> None:
        """Find the concepts among the source's, and that both classes of each occur. UsageError where they do not."""
        concepts = list(context.source.concepts)
        self._chosen = resolve_latents(self._latents, concepts, context.sae.d_sae)
        columns, seen = list(self._chosen), None
        for labels in self._first_labels(context):  # [n, n_concepts]
            chosen = labels[:, columns]
            now = torch.stack([(chosen > 0.5).any(0), (chosen <= 0.5).any(0)])  # [2, c]
            seen = now if seen is None else seen | now
            if bool(seen.all()):
                return
        for place, column in enumerate(columns):
            if seen is None or not bool(seen[:, place].all()):
                raise ComponentError(
                    f"concept {concepts[column]!r} does not occur as both 0 and 1 in the first training data: one "
                    "class alone has nothing to be told from. Give the source data of both."
                )

    def _first_labels(self, context: RunContext) -> Any:
        raise NotImplementedError

    def _scores(self, code: Code, like: Tensor) -> Tensor:
        """Each chosen latent's pre-activation less the row's bar: [rows, c]."""
        latents = torch.tensor(list(self._chosen.values()), device=like.device)
        return code.pre(latents) - bar(code)[:, None]

    def _columns(self, labels: Tensor) -> Tensor:
        return labels[:, list(self._chosen)]  # [n, c]

    def _value(self, scores: Tensor, labels: Tensor) -> Tensor:
        value = contrasts(scores, labels, form=self._form, margin=self._margin)
        return scores.sum() * 0.0 if value is None else value  # not reached where `active` is asked first


class Concept(_Concept):
    """On labelled sequences: each position takes its sequence's label, or positions are averaged first.

    The value is the mean over the concepts of `forms.contrast`."""

    def __init__(
        self,
        *,
        latents: Latents = None,
        form: Form = "hinge",
        margin: Margin = 0.5,
        on: On = "tokens",
    ) -> None:
        super().__init__(latents, form, margin)
        self._on = on

    def _first_labels(self, context: RunContext) -> Any:
        for number in range(_LOOKS):
            yield context.source.sequences("train", _LOOK, context.seed, number).labels

    def active(self, step: Step) -> bool:
        """Only where some concept has sequences of both classes."""
        return step.sequences is not None and has_both(self._columns(step.sequences.labels))

    def __call__(self, step: Step) -> Tensor:
        """The loss of one step's sequences."""
        batch: Any = step.sequences
        sequence = batch.mask.nonzero()[:, 0]  # [m], of each row of the code
        scores, labels = self._scores(batch.code, batch.x), self._columns(batch.labels)  # [m, c], [n, c]
        if self._on == "tokens":
            return self._value(scores, labels[sequence])
        sums = scores.new_zeros(len(batch), scores.shape[1]).index_add(0, sequence, scores)
        counts = batch.mask.sum(1, keepdim=True)  # [n, 1]
        labels = labels.masked_fill(counts == 0, torch.nan)  # a sequence without a position says nothing
        return self._value(sums / counts.clamp_min(1), labels)


class ConceptRows(_Concept):
    """On the labelled rows of the training batch itself: no activations are encoded besides."""

    def __init__(self, *, latents: Latents = None, form: Form = "hinge", margin: Margin = 0.5) -> None:
        super().__init__(latents, form, margin)

    def _first_labels(self, context: RunContext) -> Any:
        for batch in context.training_activations(_LOOKS * context.config.training.batch_size):
            yield batch.labels

    def active(self, step: Step) -> bool:
        """Only where some concept has rows of both classes."""
        return step.labels is not None and has_both(self._columns(step.labels))

    def __call__(self, step: Step) -> Tensor:
        """The loss of one batch."""
        assert step.labels is not None  # promised by the need `labels`
        return self._value(self._scores(step.code, step.x), self._columns(step.labels))
