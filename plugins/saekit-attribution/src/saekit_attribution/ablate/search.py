"""The search for a set of latents that is enough: chosen on some questions, tested on others, and on to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saekit_attribution.ablate.enough import Limits, Rates


@dataclass(frozen=True)
class Candidate:
    """A set of latents, the first ones of a ranking. curve: its rates on the questions that it is chosen by."""

    ranking: str
    latents: list[int]
    curve: Rates


@dataclass(frozen=True)
class Try:
    """A candidate with its rates on the test's questions. enough: by the interval of the corrected confidence."""

    candidate: Candidate
    test: Rates
    enough: bool


@dataclass(frozen=True)
class Found:
    """tries: in their order; the last one is enough if any is. planned: how many there could have been, which the
    confidence of each is corrected for. promising: how many sets were enough on the curve."""

    tries: list[Try]
    planned: int
    promising: int

    @property
    def best(self) -> Try:
        """The set that is enough; otherwise, of those tried, the best on the curve, so that the test has no say in it."""
        passed = [one for one in self.tries if one.enough]
        return passed[0] if passed else max(self.tries, key=lambda one: one.candidate.curve.worth)


def search(candidates: Sequence[Candidate], test: Callable[[Sequence[int]], Rates], limits: Limits, most: int) -> Found:
    """Test the promising candidates, the smallest first, until one is enough or `most` have been tested.

    Promising is a set whose intervals on the curve lie within the limits; if none is, the best one on the curve is tested.
    Several tests on the same questions give chance several opportunities, so each test has the confidence that is corrected
    (Bonferroni) for all tests that are planned, whether or not they take place. ValueError without candidates.
    """
    if not candidates:
        raise ValueError("there is no set of latents to try")
    promising = sorted(
        (one for one in candidates if limits.met_by(one.curve)), key=lambda one: (len(one.latents), -one.curve.worth)
    )
    distinct: dict[frozenset[int], Candidate] = {}
    for one in promising:
        distinct.setdefault(frozenset(one.latents), one)
    planned = list(distinct.values())[:most] or [max(candidates, key=lambda one: (one.curve.worth, -len(one.latents)))]
    tries: list[Try] = []
    for candidate in planned:
        rates = test(candidate.latents)
        tries.append(Try(candidate, rates, limits.met_by(rates, len(planned))))
        if tries[-1].enough:
            break
    return Found(tries, len(planned), len(distinct))
