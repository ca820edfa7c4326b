"""What a setting leaves of the questions that the unedited model answers right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saekit_unlearning.answers import Examination, Logits
from saekit_unlearning.data import FORGET, Question
from saekit_unlearning.score import Setting


@dataclass(frozen=True)
class Outcome:
    """right: {group: [entities]}, how many of each entity's questions are still right, of `questions`, those that were right
    before. changed: the largest change of the log-likelihood of any candidate."""

    right: Mapping[str, np.ndarray]
    questions: Mapping[str, np.ndarray]
    changed: float

    @property
    def setting(self) -> Setting:
        """The same without entities."""
        counts = {group: (int(right.sum()), int(self.questions[group].sum())) for group, right in self.right.items()}
        forget, asked = counts.pop(FORGET)
        return Setting(forget / asked, counts)


class Exam:
    """Questions of which only those count that the unedited model answers right.

    before: {group: (right, asked)} by the unedited model.
    groups: those of which any question counts; FORGET first.
    """

    def __init__(self, examination: Examination, group_of: Callable[[Question], str]) -> None:
        self.examination = examination
        questions = examination.questions
        self._scores = examination.scores_by(examination.site.logits)
        self._known = examination.right_of(self._scores)  # [questions]
        self._groups = np.array([group_of(question) for question in questions])
        entities = np.array([question.entity for question in questions])
        names = sorted(set(self._groups.tolist()), key=lambda group: (group != FORGET, group))
        self.before = {
            group: (int(self._known[self._groups == group].sum()), int((self._groups == group).sum()))
            for group in names
        }
        self.groups = [group for group in names if self.before[group][0]]
        self._entity = {
            group: np.unique(entities[self._counting(group)], return_inverse=True)[1] for group in self.groups
        }  # [questions that count]

    def of(self, logits: Logits, than: np.ndarray | None = None) -> Outcome:
        """What is right by other logits. than: `scores` from which changes are counted; those of the unedited model by default."""
        return self.of_scores(self.scores(logits), than)

    def scores(self, logits: Logits) -> np.ndarray:
        """The log-likelihoods of the candidates: [questions, candidates]."""
        return self.examination.scores_by(logits)

    def of_scores(self, scores: np.ndarray, than: np.ndarray | None = None) -> Outcome:
        """The same for log-likelihoods that are known."""
        right, there = self.examination.right_of(scores), np.isfinite(self._scores)
        changed = np.abs(scores[there] - (self._scores if than is None else than)[there]).max(initial=0.0)
        return Outcome(
            {group: self._sums(group, right) for group in self.groups},
            {group: self._sums(group, self._known) for group in self.groups},
            float(changed),
        )

    def _counting(self, group: str) -> np.ndarray:
        return (self._groups == group) & self._known

    def _sums(self, group: str, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._entity[group], values[self._counting(group)])


def chance(questions: Sequence[Question]) -> float:
    """The share that is right by guessing."""
    return float(np.mean([question.chance for question in questions]))
