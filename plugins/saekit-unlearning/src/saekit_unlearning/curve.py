"""The curve of what is forgotten against what is retained, and its area."""

from __future__ import annotations

from collections.abc import Sequence

from saekit_unlearning.score import Setting


def front(settings: Sequence[Setting]) -> list[int]:
    """The numbers of the settings that no other one beats in both, most retained first; of equal ones the first."""
    order = sorted(range(len(settings)), key=lambda i: (-settings[i].least_retained, settings[i].forget, i))
    found, lowest = list[int](), float("inf")
    for i in order:
        if settings[i].forget < lowest:
            found.append(i)
            lowest = settings[i].forget
    return found


def area(settings: Sequence[Setting]) -> float:
    """The mean over all bounds r from 0 to 1 of the most that is forgotten by a setting that retains at least r of every group:

        area = integral over r from 0 to 1 of max {1 - forget_i : least_retained_i >= r, or 0} dr

    1 is everything forgotten and nothing else lost; 0.5 is what losing both alike gives; the unedited model alone gives 0."""
    total, most, above = 0.0, 0.0, 1.0
    for setting in sorted(settings, key=lambda s: -s.least_retained):
        retained = min(setting.least_retained, 1.0)
        total += most * (above - retained)
        most, above = max(most, 1 - setting.forget), retained
    return total + most * above
