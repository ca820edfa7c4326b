"""`EffectCurve`: a direction's effect and damage over a sweep of strengths, to compare the damage at equal effect."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EffectCurve:
    """One direction's sweep, without strength 0, where effect and damage are 0.

    norms: of the added vector, with the sign of the strength, increasing.
    effects: change of the concept's log-odds.
    damages: KL."""

    norms: list[float]
    effects: list[float]
    damages: list[float]

    @property
    def monotone(self) -> bool:
        """Whether the effect rises from each strength to the next, strength 0 included."""
        points = sorted([(0.0, 0.0), *((n, e) for n, e in zip(self.norms, self.effects, strict=True) if n != 0)])
        return all(before[1] < after[1] for before, after in itertools.pairwise(points))

    def damage_at(self, effect: float) -> tuple[float, float] | None:
        """(norm, damage) where the curve first reaches `effect`, interpolated linearly between strengths from 0 on; None
        if it never does. Without positive strengths, the negative ones are followed."""
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

    def at_norms_of(self, other: EffectCurve) -> EffectCurve:
        """The part of the curve at the norms of another one."""
        keep = [i for i, n in enumerate(self.norms) if any(abs(n - m) <= 1e-6 * abs(m) for m in other.norms)]
        return EffectCurve(*([values[i] for i in keep] for values in (self.norms, self.effects, self.damages)))

    @property
    def largest(self) -> float:
        """The largest effect in the direction of the sweep."""
        sign = 1.0 if any(n > 0 for n in self.norms) else -1.0
        return max(sign * e for e in self.effects)


def mean(values: Sequence[float]) -> float | None:
    """The mean; None for an empty sequence."""
    return sum(values) / len(values) if values else None
