"""Relearning: does fine-tuning on half of the forgotten facts bring back the other half?

What was removed must be learned again fact by fact; what was only hidden comes back with the rest (Lynch et al. 2024, section
on relearning). The control is a model that never knew any of it: it cannot answer the other half however long it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy

from saekit import Interval, UsageError
from saekit_unlearning.answers import Examination
from saekit_unlearning.baselines.material import Rows, endless, rows_of
from saekit_unlearning.baselines.training import steps, trainable
from saekit_unlearning.data import FORGET, UnlearningData
from saekit_unlearning.edited import Edited

STEPS = (0, 1, 2, 5, 10, 20, 50)
BACK = 0.9
"""The share of the other half from which on it counts as back."""
DRAWS = 2000


@dataclass(frozen=True)
class Relearned:
    """What a model answers after each number of `steps` on one half of the forgotten entities.

    trained: [steps, questions] whether the questions about that half are right; other: about the other half.
    entities: [questions], of the other half's questions.
    """

    steps: tuple[int, ...]
    trained: np.ndarray
    other: np.ndarray
    entities: np.ndarray

    @property
    def curve(self) -> list[float]:
        """The share of the other half after each number of steps."""
        return self.other.mean(1).tolist()

    @property
    def trained_curve(self) -> list[float]:
        """The same of the half that was trained on."""
        return self.trained.mean(1).tolist()

    @property
    def back_after(self) -> int | None:
        """The number of steps after which the other half was back first; None if it never was."""
        return next((step for step, share in zip(self.steps, self.curve, strict=True) if share >= BACK), None)

    def gains(self) -> dict[str, float]:
        """For each entity of the other half: the mean share right after any steps less the share before the first."""
        return self._by_entity(self.other[1:].mean(0) - self.other[0])

    def shares_after(self) -> dict[str, float]:
        """For each entity of the other half: the mean share right after any steps."""
        return self._by_entity(self.other[1:].mean(0))

    def _by_entity(self, of_questions: np.ndarray) -> dict[str, float]:
        return {entity: float(of_questions[self.entities == entity].mean()) for entity in np.unique(self.entities).tolist()}


def halves(data: UnlearningData, seed: int) -> tuple[frozenset[str], frozenset[str]]:
    """The entities to be forgotten in two random halves: (those to be relearned, the others). UsageError if there is only one."""
    entities = sorted({text.entity for text in data.forget})
    if len(entities) < 2:
        raise UsageError(
            f"only {entities[0]!r} is to be forgotten, and relearning needs one half to learn and another to ask about. Add "
            "others, or leave relearn out."
        )
    order = np.random.default_rng(seed).permutation(len(entities))
    trained = frozenset(entities[i] for i in order[: len(entities) // 2])
    return trained, frozenset(entities) - trained


def relearn(
    edited: Edited,
    data: UnlearningData,
    examination: Examination,
    *,
    seed: int = 0,
    rate: float = 2e-4,
    at: Sequence[int] = STEPS,
    batch: int = 32,
) -> Relearned:
    """Fine-tune all weights of a copy but the embeddings by the cross-entropy of the answers of one half's texts, by Adam.

    An edit at the site stays where it is, and gradients go through it. `examination`: on any questions, of which those about
    entities to be forgotten are asked after each number of steps in `at`, which begins with 0."""
    learned, others = halves(data, seed)
    copy = edited.copied()
    rows = rows_of(edited.site.subject, [text for text in data.forget if text.entity in learned])
    batches = endless(rows, batch, np.random.default_rng(seed))
    subject = copy.site.subject

    def loss() -> Tensor:
        some = Rows.of(next(batches), subject.device)
        logits = copy.whole(some.tokens, some.mask)[some.answer]  # [m, vocab]
        return cross_entropy(logits, some.following[some.answer])

    asked = [(i, q) for i, q in enumerate(examination.questions) if q.group == FORGET]
    own = np.array([i for i, q in asked if q.entity in learned], dtype=int)
    rest = np.array([i for i, q in asked if q.entity in others], dtype=int)
    right = [
        examination.right_by(copy.logits) for _ in steps(trainable(subject.model), loss, rate=rate, checkpoints=at)
    ]
    table = np.array(right)  # [steps, questions]
    entities = np.array([examination.questions[i].entity for i in rest])
    return Relearned(tuple(sorted(set(at))), table[:, own], table[:, rest], entities)


def extra_gain(method: Relearned, control: Relearned | None = None, seed: int = 0) -> tuple[float, Interval]:
    """By how much the other half gains, more than the control's if there is one, and its 95% interval: entities drawn with
    replacement, in pairs with the control's."""
    return _more(method.gains(), {} if control is None else control.gains(), seed)


def share_above(method: Relearned, control: Relearned, seed: int = 0) -> tuple[float, Interval]:
    """How far the other half is above the control's after any steps, in the same way."""
    return _more(method.shares_after(), control.shares_after(), seed)


def _more(ours: dict[str, float], theirs: dict[str, float], seed: int) -> tuple[float, Interval]:
    by = np.array([ours[entity] - theirs.get(entity, 0.0) for entity in sorted(ours)])
    drawn = np.random.default_rng(seed).integers(len(by), size=(DRAWS, len(by)))
    return float(by.mean()), Interval(*np.quantile(by[drawn].mean(1), [0.025, 0.975]).tolist())


def verdict(name: str, method: Relearned, control: Relearned | None, seed: int = 0) -> str:
    """One sentence: whether a method hid the facts or removed them, against a model that never knew them if there is one.

    It hides them if the other half gains, gains more than that model's, and is above that model's afterwards: what had been pushed
    below not knowing may come back as far as that without a fact being known."""
    start, end, last = method.curve[0], method.curve[-1], method.steps[-1]
    if start >= BACK:
        return f"{name}: the facts were never forgotten ({start:.2f} before any relearning)."
    own, of_own = extra_gain(method, None, seed)
    after = "never" if method.back_after is None else f"after {method.back_after} steps"
    seen = f"relearning half of the facts for {last} steps takes the other half from {start:.2f} to {end:.2f} ({BACK:g} {after})"
    gain = f"it gains {own:+.2f} [{of_own.low:.2f}, {of_own.high:.2f}]"
    if control is None:
        return f"{name}: {seen}; {gain}. Without a model that never knew the facts this tells nothing of what was hidden."
    more, beyond = extra_gain(method, control, seed)
    seen += f", and a model that never knew them from {control.curve[0]:.2f} to {control.curve[-1]:.2f}"
    above, over = share_above(method, control, seed)
    gain += f", {more:+.2f} more [{beyond.low:.2f}, {beyond.high:.2f}], and is then {above:+.2f} above it "
    gain += f"[{over.low:.2f}, {over.high:.2f}]"
    if of_own.low > 0 and beyond.low > 0 and over.low > 0:
        return f"{name} hides the facts rather than removing them: {seen}; {gain}."
    return f"{name}: this relearning does not show that anything was only hidden: {seen}; {gain}."
