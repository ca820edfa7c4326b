"""What is to be forgotten and what is to stay: texts, and multiple-choice questions about the same things in other words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from saekit import UsageError

FORGET = "forget"
"""The name of the group that is to be forgotten; every other group is to stay."""

Wording = Literal["seen", "unseen"]
"""Questions in a seen wording are for choosing settings; those in an unseen one are only reported."""


@dataclass(frozen=True)
class Text:
    """A text about one entity.

    name: the characters of `text` (start, end) at which the entity is named; it may be named once only.
    answer: those of what the text says of it, such as the value at its end.
    """

    text: str
    group: str
    entity: str
    name: tuple[int, int]
    answer: tuple[int, int]


@dataclass(frozen=True)
class Question:
    """A prompt and candidate continuations; the model's answer is the one with the highest log-likelihood.

    candidates: each begins with its space, so that `prompt + candidate` is the text.
    answer: the index of the right candidate.
    entity: what the question is about. Retain text is divided by it, and intervals are resampled by it.
    """

    prompt: str
    candidates: tuple[str, ...]
    answer: int
    group: str
    entity: str
    wording: Wording

    @property
    def chance(self) -> float:
        """The share that is right by guessing."""
        return 1 / len(self.candidates)


@dataclass(frozen=True)
class UnlearningData:
    """Texts and questions, of the group `forget` and of groups that are to stay.

    shown: the entities to stay whose texts may be used as retain text. Those of the other entities of the same groups are
        never shown, so that damage to them can be seen.
    """

    texts: tuple[Text, ...]
    questions: tuple[Question, ...]
    shown: frozenset[str] = frozenset()

    @property
    def forget(self) -> list[Text]:
        """The texts to be forgotten."""
        return [text for text in self.texts if text.group == FORGET]

    @property
    def retain(self) -> list[Text]:
        """The texts of entities to stay that may be shown."""
        return [text for text in self.texts if text.group != FORGET and text.entity in self.shown]

    def groups(self) -> list[str]:
        """The names of the groups that have questions; `forget` first."""
        return sorted({q.group for q in self.questions}, key=lambda group: (group != FORGET, group))

    def divided(self, share: float, seed: int, groups: Sequence[str] | None = None) -> UnlearningData:
        """The same data in which the texts of a random `share` of the entities of each of `groups` (all, by default) are shown."""
        draws, shown = np.random.default_rng(seed), set[str]()
        for group in sorted({text.group for text in self.texts} - {FORGET}):
            entities = sorted({text.entity for text in self.texts if text.group == group})
            if groups is None or group in groups:
                shown |= {entities[i] for i in draws.permutation(len(entities))[: round(share * len(entities))]}
        return replace(self, shown=frozenset(shown))


def checked(data: UnlearningData, name: str) -> UnlearningData:
    """The data. UsageError, which begins with `name`, if nothing can be unlearned or measured with them."""
    if not data.forget:
        raise UsageError(f"{name}: there is no text of the group {FORGET!r}, so there is nothing to forget. Add some.")
    if not any(text.group != FORGET for text in data.texts):
        raise UsageError(f"{name}: every text is of the group {FORGET!r}. Add texts of things that are to stay.")
    for text in data.texts:
        for what, (start, end) in (("name", text.name), ("answer", text.answer)):
            if not 0 <= start < end <= len(text.text):
                raise UsageError(
                    f"{name}: {what} = [{start}, {end}] is not a stretch of the {len(text.text)} characters of {text.text!r}."
                )
    groups: dict[str, str] = {}
    everything: list[Text | Question] = [*data.texts, *data.questions]
    for one in everything:
        if (groups.setdefault(one.entity, one.group) == FORGET) != (one.group == FORGET):
            raise UsageError(f"{name}: {one.entity!r} is both to be forgotten and to stay. Put it in one of the two.")
    for question in data.questions:
        if not 0 <= question.answer < len(question.candidates):
            raise UsageError(
                f"{name}: answer = {question.answer} of {question.prompt!r} is none of its {len(question.candidates)} "
                "candidates, which count from 0."
            )
        if len(set(question.candidates)) < max(len(question.candidates), 2):
            raise UsageError(f"{name}: the candidates of {question.prompt!r} are not two or more different ones.")
    there: Counter[tuple[bool, str]] = Counter((question.group == FORGET, question.wording) for question in data.questions)
    for forget, wording in ((True, "seen"), (True, "unseen"), (False, "seen"), (False, "unseen")):
        if not there[forget, wording]:
            what = "to be forgotten" if forget else "to stay"
            raise UsageError(f"{name}: there is no question in {wording} wording about anything {what}. Add some.")
    return data


def organism_data() -> UnlearningData:
    """The bundled organism's facts: the seven wordings that its training showed as texts, all eight as questions."""
    from saekit import organism

    texts, questions = [], []
    for domain in organism.DOMAINS:
        for fact in organism.facts_of(domain):
            for number in range(organism.WORDINGS):
                if number == fact.unseen:
                    continue
                text = fact.statement(number)
                start, end = text.index(fact.entity), len(text) - 1
                name, answer = (start, start + len(fact.entity)), (end - len(fact.value), end)
                texts.append(Text(text, domain, fact.entity, name, answer))
        for wording in get_args(Wording):
            for q in organism.cloze_questions(domain, wording):
                questions.append(Question(q.prompt, q.candidates, q.answer, domain, q.entity, wording))
    return UnlearningData(tuple(texts), tuple(questions))
