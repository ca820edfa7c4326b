"""Effects and damages of directions over a sweep: whether they rise, and the damage at an effect that is the same for all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """A direction's sweep, without the strength 0, which has effect and damage 0.

    norms: of what is added, with the sign of the strength, increasing. effects: change of the concept's log-odds.
    damages: KL."""

    norms: list[float]
    effects: list[float]
    damages: list[float]

    @property
    def monotone(self) -> bool:
        """Whether the effect rises with every strength, 0 among them."""
        points = sorted([(0.0, 0.0), *((n, e) for n, e in zip(self.norms, self.effects, strict=True) if n != 0)])
        return all(before[1] < after[1] for before, after in itertools.pairwise(points))

    def damage_at(self, effect: float) -> tuple[float, float] | None:
        """(norm, damage) where the effect is first reached, by linear interpolation between strengths from 0 on; None where
        no strength reaches it. Of a sweep without positive strengths, the negative ones are followed."""
        sign = 1.0 if any(n > 0 for n in self.norms) else -1.0
        points = [(0.0, 0.0, 0.0)]
        points += sorted(
            (sign * n, sign * e, d)
            for n, e, d in zip(self.norms, self.effects, self.damages, strict=True)
            if sign * n > 0
        )
        for (n0, e0, d0), (n1, e1, d1) in itertools.pairwise(points):
            if e0 < effect <= e1:
                part = (effect - e0) / (e1 - e0)
                return n0 + part * (n1 - n0), d0 + part * (d1 - d0)
        return None

    @property
    def largest(self) -> float:
        """The largest effect in the direction of the sweep."""
        sign = 1.0 if any(n > 0 for n in self.norms) else -1.0
        return max(sign * e for e in self.effects)


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None
