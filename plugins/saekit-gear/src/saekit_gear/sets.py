"""Generated gear sets whose structure is known: archetypes, weapon classes, combinations, and a meta that changes by season.

A set is a season, a weapon and five to eight abilities. What is planted in it:

- **archetype** (hidden: no item names it): which abilities go together, and which weapon classes. Four abilities are its core.
- **weapon class**: five weapons each, which no item names either; each class has two abilities of its own.
- **combination**: two abilities with which a part of the sets begins. Wherever both are, they bring a third and keep a fourth away,
  which neither of the two does alone. The label says that both are there.
- **meta**: archetypes become more or less popular from season to season, along a straight line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

ABILITIES = (
    "swim speed", "run speed", "ink saver", "ink recovery", "special charge", "special power", "quick respawn", "quick jump",
    "bomb range", "bomb power", "bomb defence", "ink resistance", "steady aim", "high hop", "action up", "stealth", "haunt",
    "decoy jump", "tracker", "respawn punisher", "comeback", "opening gambit", "last ditch", "drop roller",
)  # fmt: skip
ARCHETYPES = {  # name: its core
    "rusher": ("swim speed", "quick respawn", "comeback", "opening gambit"),
    "lurker": ("stealth", "swim speed", "ink resistance", "haunt"),
    "anchor": ("steady aim", "ink recovery", "respawn punisher", "last ditch"),
    "support": ("special charge", "tracker", "bomb defence", "quick jump"),
    "bomber": ("bomb range", "bomb power", "ink saver", "ink recovery"),
    "jumper": ("quick jump", "decoy jump", "drop roller", "quick respawn"),
    "skirmisher": ("run speed", "high hop", "action up", "ink resistance"),
    "specialist": ("special power", "special charge", "last ditch", "ink saver"),
}
CLASSES = {  # name: what its weapons favour
    "shooter": ("run speed", "steady aim"),
    "roller": ("stealth", "swim speed"),
    "charger": ("ink recovery", "respawn punisher"),
    "slosher": ("bomb power", "ink saver"),
    "dualies": ("action up", "drop roller"),
    "brush": ("high hop", "haunt"),
}
COMBINATIONS = {  # the two, what they bring, what they keep away
    ("stealth", "decoy jump"): ("tracker", "run speed"),
    ("run speed", "bomb range"): ("special power", "ink recovery"),
    ("comeback", "special charge"): ("bomb power", "swim speed"),
    ("high hop", "ink recovery"): ("opening gambit", "quick respawn"),
    ("haunt", "last ditch"): ("bomb defence", "ink saver"),
    ("action up", "quick respawn"): ("steady aim", "special charge"),
}
WEAPONS = tuple(f"{name} {letter}" for name in CLASSES for letter in "ABCDE")
SEASONS = tuple(f"season {number}" for number in range(1, 7))
ITEMS = (*ABILITIES, *WEAPONS, *SEASONS)
"""What a set is made of; item i has the number i + 1, and 0 is padding."""
CONCEPTS = (*ARCHETYPES, *CLASSES, *(" + ".join(pair) for pair in COMBINATIONS))
"""The names of the labels: archetypes, weapon classes, combinations."""
LONGEST = 10
"""Items of the largest set."""

_A = len(ABILITIES)
_PLACE = {name: number for number, name in enumerate(ABILITIES)}
_CORE, _FAVOURED, _BROUGHT = 3.0, 1.5, 4.0  # added to the log weight of an ability; what is kept away has _BROUGHT less
_COMBINED = 0.45  # share of the sets that begin with a combination


class Sets(NamedTuple):
    """items: [n, LONGEST] numbers, 0 at padding. mask: [n, LONGEST], True where an item is. labels: [n, len(CONCEPTS)]."""

    items: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def generate(n: int, seed: Sequence[int]) -> Sets:
    """`n` sets; equal seeds give equal sets, different ones independent sets."""
    draws = np.random.default_rng(seed)
    season = draws.integers(len(SEASONS), size=n)
    archetype = _pick(_popularity()[season], draws)
    weapon_class = _pick(_class_shares()[archetype], draws)
    weapon = weapon_class * 5 + draws.integers(5, size=n)
    weights = _CORE * _marks(ARCHETYPES)[archetype] + _FAVOURED * _marks(CLASSES)[weapon_class]  # [n, _A] log weights
    chosen = _begun(n, draws)
    counts = draws.integers(5, 9, size=n)
    chosen = _more(chosen, weights, np.maximum(counts - 2, 3), draws)
    chosen = _more(chosen, weights + _effects(_combined(chosen)), counts, draws)
    return _as_sets(chosen, _A + weapon, _A + len(WEAPONS) + season, archetype, weapon_class, draws)


def batches(split: str, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches for the source `module`: 512 sets each, 240 for training, new ones in each pass, or 40 held-out ones."""
    held_out = split == "held_out"
    for number in range(40 if held_out else 240):
        yield generate(512, (2 if held_out else 1, seed, number))._asdict()


def show(batch: dict[str, torch.Tensor], row: int) -> Any:
    """One set as its reader should see it, with what is planted in it as a caption."""
    from saekit import Items

    parts = [ITEMS[item - 1] for item in sorted(batch["items"][row].tolist()) if item]
    there = [name for name, label in zip(CONCEPTS, batch["labels"][row].tolist(), strict=True) if label]
    return Items(parts=parts, caption=", ".join(there))


def _marks(of: Mapping[str, tuple[str, ...]]) -> np.ndarray:
    """[len(of), _A], 1 where an ability belongs to a name."""
    return np.array([[ability in abilities for ability in ABILITIES] for abilities in of.values()], dtype=float)


def _popularity() -> np.ndarray:
    """[seasons, archetypes]: the meta. Every second archetype rises, the others fall."""
    time = np.linspace(-1, 1, len(SEASONS))[:, None]
    slope = np.where(np.arange(len(ARCHETYPES)) % 2, 0.6, -0.6)
    weights = np.exp(time * slope)
    return weights / weights.sum(1, keepdims=True)


def _class_shares() -> np.ndarray:
    """[archetypes, classes]: each archetype prefers two classes."""
    weights = np.ones((len(ARCHETYPES), len(CLASSES)))
    for number in range(len(ARCHETYPES)):
        weights[number, [number % len(CLASSES), (number + 2) % len(CLASSES)]] = 3
    return weights / weights.sum(1, keepdims=True)


def _pick(shares: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """One number for each row of shares [n, k]: [n]."""
    return np.minimum((shares.cumsum(1) < draws.random(len(shares))[:, None]).sum(1), shares.shape[1] - 1)


def _pairs() -> np.ndarray:
    return np.array([[_PLACE[one] for one in pair] for pair in COMBINATIONS])  # [combinations, 2]


def _begun(n: int, draws: np.random.Generator) -> np.ndarray:
    """[n, _A] booleans: the two abilities of a combination in some sets, nothing in the others."""
    chosen = np.zeros((n, _A), dtype=bool)
    some = np.flatnonzero(draws.random(n) < _COMBINED)
    pairs = _pairs()[draws.integers(len(COMBINATIONS), size=len(some))]
    chosen[some[:, None], pairs] = True
    return chosen


def _combined(chosen: np.ndarray) -> np.ndarray:
    """[n, combinations]: whether both abilities are there."""
    together: Any = chosen[:, _pairs()].all(2)
    return together


def _effects(combined: np.ndarray) -> np.ndarray:
    """[n, _A]: what combinations add to the log weights."""
    effects = np.zeros((len(COMBINATIONS), _A))
    for number, (brought, kept_away) in enumerate(COMBINATIONS.values()):
        effects[number, _PLACE[brought]], effects[number, _PLACE[kept_away]] = _BROUGHT, -_BROUGHT
    return combined @ effects


def _more(chosen: np.ndarray, weights: np.ndarray, counts: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Abilities are added one by one, in proportion to exp(weights) and without replacement, until there are `counts` [n].

    The largest of log weight + Gumbel noise are such a draw (Kool et al. 2019)."""
    scores = np.where(chosen, np.inf, weights + draws.gumbel(size=weights.shape))
    rank = (-scores).argsort(1).argsort(1)
    return rank < np.maximum(counts, chosen.sum(1))[:, None]


def _as_sets(
    chosen: np.ndarray, weapon: np.ndarray, season: np.ndarray, archetype: np.ndarray, weapon_class: np.ndarray, draws: Any
) -> Sets:
    """Items in a random order, which must not matter, and labels."""
    n = len(chosen)
    there = np.zeros((n, len(ITEMS)), dtype=bool)
    there[:, :_A] = chosen
    there[np.arange(n), weapon] = there[np.arange(n), season] = True
    order = np.where(there, draws.random(there.shape), 2.0).argsort(1)[:, :LONGEST]
    mask = np.arange(LONGEST) < there.sum(1)[:, None]
    labels = [np.eye(len(ARCHETYPES))[archetype], np.eye(len(CLASSES))[weapon_class], _combined(chosen)]
    return Sets(
        torch.from_numpy(np.where(mask, order + 1, 0)), torch.from_numpy(mask), torch.from_numpy(np.concatenate(labels, 1)).float()
    )
