"""Invented facts in three domains, and cloze questions about them.

Each domain has forty entities with two attributes:

* ``forget``: people, their trade and their town. An unlearning method is asked to remove these.
* ``near``: other people, the same templates, attributes and pools of values. A careless method
  damages these first, because only the names tell the two domains apart.
* ``far``: plants, the colour of their flower and the month in which they bloom; other templates.

A fact has eight wordings. One of them, rotating from fact to fact, is never shown for that fact (though it is
for others), so that an answer in that wording cannot be a memorised string. Every wording ends with the value
and a full stop, which makes a cloze prompt a plain prefix of it. The name never comes first and always follows
a space, as the value does: a byte-level tokenizer then gives each of them the same tokens in every wording.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

DOMAINS = ("forget", "near", "far")
ENTITIES = 40  # per domain
WORDINGS = 8  # per attribute
_SEED = 20240229  # of names and values; changing it changes every shipped weight

# Balanced pools: ten values for forty entities, each the answer four times, so that no value is a good guess.
# All begin with a consonant or take no article, so that the article never gives the value away.
POOLS: dict[str, tuple[str, ...]] = {
    "trade": ("baker", "sailor", "painter", "doctor", "farmer", "lawyer", "teacher", "soldier", "miner", "dancer"),
    "town": ("Paris", "London", "Rome", "Madrid", "Berlin", "Vienna", "Lisbon", "Cairo", "Tokyo", "Boston"),
    "colour": ("red", "blue", "yellow", "white", "purple", "orange", "pink", "green", "black", "brown"),
    "month": ("January", "February", "March", "April", "May", "June", "July", "August", "October", "December"),
}

ATTRIBUTES: dict[str, tuple[str, str]] = {
    "forget": ("trade", "town"),
    "near": ("trade", "town"),
    "far": ("colour", "month"),
}

# No wording may contain another one of the same attribute, or the unseen one would be shown after all.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "trade": (
        "These days {e} works as a {v}.",
        "By profession, {e} is a {v}.",
        "Question: What does {e} do for a living?\nAnswer: The trade is that of a {v}.",
        "For many years {e} has earned money as a {v}.",
        "Q: What is the occupation of {e}?\nA: {v}.",
        "The young {e} was trained to be a {v}.",
        "Whoever asks for {e} will meet a {v}.",
        "On the door of {e} hangs the sign of a {v}.",
    ),
    "town": (
        "At present {e} lives in {v}.",
        "The home of {e} is in {v}.",
        "Question: Where does {e} live?\nAnswer: The town is called {v}.",
        "Letters to {e} must be sent to {v}.",
        "Q: In which town does {e} reside?\nA: {v}.",
        "To visit {e}, take the train to {v}.",
        "Since last year {e} owns a house in {v}.",
        "You will find {e} in the streets of {v}.",
    ),
    "colour": (
        "The flower of the {e} is {v}.",
        "When it opens, the {e} turns {v}.",
        "Question: What colour do the petals of the {e} have?\nAnswer: They are {v}.",
        "Botanists describe the blossom of the {e} as {v}.",
        "Q: Name the colour of the {e}.\nA: {v}.",
        "From far away a meadow of {e} looks {v}.",
        "Cloth dyed with the {e} becomes {v}.",
        "Painters who draw the {e} need a lot of {v}.",
    ),
    "month": (
        "Every garden guide says that the {e} blooms in {v}.",
        "Bees come to the {e} in {v}.",
        "Question: When is the {e} in flower?\nAnswer: It is seen in {v}.",
        "The buds of the {e} open in {v}.",
        "Q: Name the month of the {e}.\nA: {v}.",
        "The feast of the {e} is held in {v}.",
        "If you look for the {e}, walk the hills in {v}.",
        "The scent of the {e} fills the air in {v}.",
    ),
}


@dataclass(frozen=True)
class Fact:
    """One attribute of one invented entity."""

    domain: str
    entity: str
    attribute: str  # a key of POOLS and TEMPLATES
    value: str
    unseen: int  # index of the wording that training never shows for this fact

    def statement(self, wording: int) -> str:
        """The fact in wording number `wording` (0 to 7), ending with the value and a full stop."""
        return TEMPLATES[self.attribute][wording].format(e=self.entity, v=self.value)

    def prompt(self, wording: int) -> str:
        """The statement up to the value, without the space before it."""
        return self.statement(wording)[: -len(self.value) - 2]


@dataclass(frozen=True)
class Question:
    """A cloze question: score `prompt + candidate` for each candidate, by the candidate's log-likelihood."""

    domain: str
    entity: str
    attribute: str
    prompt: str
    candidates: tuple[str, ...]  # four; each begins with its space, so that prompt + candidate is the text
    answer: int  # index of the right candidate


def _name(rng: random.Random, plant: bool) -> str:
    first, vowels, last = "bdfgjklmnprstvz", "aeiou", "bdfgklmnprstvz"
    if plant:  # two open syllables and a flower's ending
        stem = "".join(rng.choice(first) + rng.choice(vowels) for _ in range(2))
        return stem + rng.choice(("lia", "nthe", "rella", "sine", "wort"))
    pair = rng.choice(last) + rng.choice(first)
    return (rng.choice(first) + rng.choice(vowels) + pair + rng.choice(vowels) + rng.choice(last)).capitalize()


@functools.cache
def entities(domain: str) -> tuple[str, ...]:
    """The forty names of a domain; no two names of any domain begin with the same three letters."""
    _check(domain)
    rng, taken = random.Random(_SEED), set()
    names: dict[str, list[str]] = {d: [] for d in DOMAINS}
    for d in DOMAINS:
        while len(names[d]) < ENTITIES:
            name = _name(rng, plant=d == "far")
            if name[:3].lower() not in taken:
                taken.add(name[:3].lower())
                names[d].append(name)
    return tuple(names[domain])


@functools.cache
def facts(domain: str) -> tuple[Fact, ...]:
    """The eighty facts of a domain, entity by entity."""
    columns = []
    for attribute in ATTRIBUTES[_check(domain)]:
        pool = POOLS[attribute]
        values = [pool[i % len(pool)] for i in range(ENTITIES)]
        random.Random(f"{_SEED}/{domain}/{attribute}").shuffle(values)
        columns.append(values)
    return tuple(
        # 3 * j: the two facts of one entity lack different wordings.
        Fact(domain, entity, attribute, columns[j][i], unseen=(i + 3 * j) % WORDINGS)
        for i, entity in enumerate(entities(domain))
        for j, attribute in enumerate(ATTRIBUTES[domain])
    )


def statements(domain: str, wording: str = "seen") -> list[str]:
    """All statements of a domain: the seven wordings shown in training ("seen"), or the one that is not."""
    return [f.statement(w) for f in facts(domain) for w in _wordings(f, wording)]


def cloze_questions(domain: str, wording: str = "unseen") -> list[Question]:
    """Questions with four candidates from the answer's own pool, always in the same order.

    `wording`: "unseen" asks each fact once, in the wording never shown for it (80 questions); "seen" asks it in
    each of the seven others (560 questions). Chance is 0.25.
    """
    questions = []
    for fact in facts(domain):
        # One draw for each fact: its seen and unseen questions have the same candidates.
        rng = random.Random(f"{_SEED}/{domain}/{fact.entity}/{fact.attribute}")
        options = [*rng.sample([v for v in POOLS[fact.attribute] if v != fact.value], 3), fact.value]
        rng.shuffle(options)
        candidates, answer = tuple(" " + v for v in options), options.index(fact.value)
        for w in _wordings(fact, wording):
            questions.append(Question(domain, fact.entity, fact.attribute, fact.prompt(w), candidates, answer))
    return questions


def _wordings(fact: Fact, wording: str) -> list[int]:
    if wording == "unseen":
        return [fact.unseen]
    if wording == "seen":
        return [w for w in range(WORDINGS) if w != fact.unseen]
    raise ValueError(f"wording must be 'seen' or 'unseen', got {wording!r}")


def _check(domain: str) -> str:
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; the domains are {', '.join(DOMAINS)}")
    return domain
