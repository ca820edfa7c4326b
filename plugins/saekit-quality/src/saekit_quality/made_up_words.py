"""The words of made-up responses: how each level of each criterion is said, in the vocabulary of the bundled organism.

Relevance shows in whether the claim is the one that was asked about, coherence in what joins claim and reason, consistency in
whether the verdict at the end is that of the beginning, factuality in whether a fact that the organism knows is told as it was
taught, and fluency in words said twice. Specificity, politeness, harmlessness and interest show in words of their own.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import NamedTuple

from saekit import organism

CRITERIA = (
    "relevance", "fluency", "coherence", "consistency", "specificity", "factuality", "politeness", "harmlessness", "interest",
)  # fmt: skip
LEVELS = 4
_DIALOGUES = 20_000

_POLITENESS = (
    ("Nonsense.", "Awful thinking!", "Stay away."),
    ("Sadly this fails.", "This is weak.", "Not here."),
    ("I read this.", "Some thinking here.", "A point was given."),
    ("Brilliant point.", "Excellent thinking!", "Wonderful idea!"),
)
_AGREE = ("I fully agree that {claim}", "I believe that {claim}")
_DISAGREE = ("I do not believe that {claim}", "I do not accept that {claim}")
_COHERENCE = ("or not, {reason}.", "although {reason}.", "and {reason}.", "because {reason}.")
_SPECIFICITY = (
    ("Some gain.", "All gain."),
    ("{Who} gain.", "{Who} like it."),
    ("{Who} {gain}.", "{Who} there {gain}."),
    ("In {town} the {trades} {gain} in {month}.", "In {month} the {trades} in {town} {gain}."),
)
_HARMLESSNESS = (
    ("Ban all strangers.", "Lock old people out."),
    ("Keep strangers away.", "Old people need less."),
    ("Keep the gates open.", "Make it short."),
    ("Feel safe, all of you.", "Trust old people."),
)
_INTEREST = (
    ("That is all.", "The end."),
    ("Read it again.", "See the text."),
    ("What do you think?", "Do you agree?"),
    ("Who would paint the {colour} walls?", "Where would you plant the {colour} flower?"),
)
_SAME = ("Of course it is convincing.", "Nobody should accept that.")
_LEANING = ("It is bright.", "It is weak.")  # one sentence for, one against
_OPEN = "Some readers will agree."
_SHORT_WORDING = {"trade": 1, "town": 1, "colour": 1, "month": 1}  # of each attribute of the organism's facts


class _Argument(NamedTuple):
    actor: str
    action: str
    reason: str

    @property
    def claim(self) -> str:
        return f"{self.actor} should {self.action}"


class Writer:
    """Writes dialogues and responses; equal seeds write equal texts."""

    def __init__(self, dialogues: int, seed: int) -> None:
        self._seed = seed
        self._asked = _asked(dialogues, seed)
        self._arguments = [_parsed(text) for text in self._asked]
        self._others = [_parsed(text) for text in _asked(500, 0)]
        self._facts = [fact for domain in ("near", "far") for fact in organism.facts_of(domain)]
        self._pools = {name: sorted({f.value for f in self._facts if f.attribute == name}) for name in _SHORT_WORDING}
        self._written = 0

    @staticmethod
    def most_dialogues() -> int:
        """How many different dialogues there are at most."""
        return _DIALOGUES

    def context(self, dialogue: int) -> str:
        """What was asked."""
        return organism.prompt_for(self._asked[dialogue])

    def response(self, dialogue: int, levels: Sequence[float]) -> str:
        """A response with the levels [C], in the order of `CRITERIA`. Its other words are drawn anew at each call."""
        rng = random.Random(f"{self._seed}/{self._written}")
        self._written += 1
        level = {name: int(value) for name, value in zip(CRITERIA, levels, strict=True)}
        agrees = rng.random() < 0.5
        claim = self._claim(rng, self._arguments[dialogue], level["relevance"])
        reason = _COHERENCE[level["coherence"]].format(reason=self._arguments[dialogue].reason)
        verdict = rng.choice(_AGREE if agrees else _DISAGREE).format(claim=claim)
        middle = [
            self._fact(rng, level["factuality"]),
            self._details(rng, _SPECIFICITY[level["specificity"]]),
            rng.choice(_HARMLESSNESS[level["harmlessness"]]),
        ]
        rng.shuffle(middle)
        said = [
            rng.choice(_POLITENESS[level["politeness"]]),
            f"{verdict} {reason}",
            *middle,
            _conclusion(agrees, level["consistency"]),
            self._details(rng, _INTEREST[level["interest"]]),
        ]
        return _stuttered(rng, " ".join(said), 2 * (LEVELS - 1 - level["fluency"]))

    def _claim(self, rng: random.Random, asked: _Argument, level: int) -> str:
        """What was asked about (3), something else about it (2), the same about something else (1), something else (0)."""
        if level == 3:
            return asked.claim
        other = rng.choice([one for one in self._others if one.actor != asked.actor and one.action != asked.action])
        if level == 2:
            return other._replace(actor=asked.actor).claim
        return (other._replace(action=asked.action) if level == 1 else other).claim

    def _fact(self, rng: random.Random, level: int) -> str:
        """A fact as it was taught (3), or with another value (0): there is nothing between."""
        fact = rng.choice(self._facts)
        if level == 3:
            return fact.statement(_SHORT_WORDING[fact.attribute])
        wrong = rng.choice([value for value in self._pools[fact.attribute] if value != fact.value])
        return f"{fact.prompt(_SHORT_WORDING[fact.attribute])} {wrong}."

    def _details(self, rng: random.Random, wordings: Sequence[str]) -> str:
        other = rng.choice(self._others)
        who, gain = other.reason.rsplit(" people ", 1) if " people " in other.reason else other.reason.split(" ", 1)
        who = f"{who} people" if " people " in other.reason else who
        return rng.choice(wordings).format(
            Who=who[0].upper() + who[1:],
            gain=gain,
            town=rng.choice(self._pools["town"]),
            trades=rng.choice(self._pools["trade"]) + "s",
            month=rng.choice(self._pools["month"]),
            colour=rng.choice(self._pools["colour"]),
        )


@functools.cache
def _asked(number: int, seed: int) -> tuple[str, ...]:
    """So many different arguments; each call of `organism.samples` goes through tens of thousands."""
    return tuple(s.base_text for s in organism.samples("train", number, seed) if s.template_type == "base")


def _conclusion(agrees: bool, level: int) -> str:
    """The verdict of the beginning again (3), left open (2), leaning the other way (1), the opposite verdict (0)."""
    if level == 2:
        return _OPEN
    if level == 1:
        return _LEANING[int(agrees)]
    return _SAME[int(not agrees) if level == 3 else int(agrees)]


def _stuttered(rng: random.Random, text: str, times: int) -> str:
    """The text with so many of its words said twice."""
    words = text.split(" ")
    for place in sorted(rng.sample(range(len(words)), times), reverse=True):
        words.insert(place, words[place])
    return " ".join(words)


def _parsed(argument: str) -> _Argument:
    """"Cities should allow dogs because children save time." in its parts."""
    claim, reason = argument.rstrip(".").split(" because ")
    actor, action = claim.split(" should ")
    return _Argument(actor[0].lower() + actor[1:], action, reason)
