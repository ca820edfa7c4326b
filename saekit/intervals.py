"""Confidence intervals: of a share, and of an AUROC whose rows come in groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

FEW_GROUPS = 10
"""With fewer groups of either class, a variance estimated from them is too often far too small."""


class Interval(NamedTuple):
    """A confidence interval; both ends belong to it."""

    low: float
    high: float


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """The interval of a share (Wilson 1927): `successes` of `trials` independent ones. 0 to 1 if there were no trials."""
    from scipy.stats import binomtest  # slow to import

    if trials == 0:
        return Interval(0.0, 1.0)
    found = binomtest(int(successes), int(trials)).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def auroc_interval(scores: ArrayLike, labels: ArrayLike, groups: ArrayLike, confidence: float = 0.95) -> Interval | None:
    """The interval of an AUROC whose rows are independent between groups only, as positions of a sequence are not.

    scores, labels, groups: [n] each; a label is 0, 1 or NaN (left out), and a group is any number. With a group for each
    row, rows are independent. None if a class has no rows.

    The variance is that of the groups' structural components (Obuchowski 1997; DeLong et al. 1988 if each row is a group of
    its own), found by ranks in O(n log n). The interval is symmetric in log(AUROC / (1 - AUROC)), with the quantile of
    Student's t for as many degrees of freedom as the groups of both classes give (Welch 1947).

    That degenerates where the AUROC is 0 or 1, and a class with fewer than `FEW_GROUPS` groups gives hardly any estimate of
    a variance. Then it is the interval of Newcombe (2006, part 2, method 5) with groups as the units: it needs only their
    numbers, and is conservative, since a group of several rows tells at least as much as one row. With few groups it is
    the hull of both.
    """
    import numpy as np

    scores, labels, groups = (np.asarray(values, dtype=np.float64) for values in (scores, labels, groups))
    known = ~np.isnan(labels)
    scores, positive = scores[known], labels[known] > 0.5
    group = np.unique(groups[known], return_inverse=True)[1]
    if positive.all() or not positive.any():
        return None
    value, variance, freedom = _obuchowski(scores, positive, group)
    m, n = len(np.unique(group[positive])), len(np.unique(group[~positive]))
    conservative = _newcombe(value, m, n, confidence)
    if not 0 < value < 1 or variance == 0 or freedom <= 0:
        return conservative
    found = _on_logit_scale(value, math.sqrt(variance), freedom, confidence)
    if min(m, n) < FEW_GROUPS:
        return Interval(min(found.low, conservative.low), max(found.high, conservative.high))
    return found


def _obuchowski(scores: NDArray[Any], positive: NDArray[Any], group: NDArray[Any]) -> tuple[float, float, float]:
    """The AUROC, its variance, and the degrees of freedom; a variance of 0 with 0 of these if a class has a single group."""
    import numpy as np
    from scipy.stats import rankdata

    count = int(group.max()) + 1
    ranks = rankdata(scores)
    parts, sizes = [], []
    for own in (positive, ~positive):
        others = (~own).sum()
        below = (ranks[own] - rankdata(scores[own])) / others  # rows of the other class that score lower, ties half: [m]
        component = below if own is positive else 1 - below
        parts.append(np.bincount(group[own], component, count))  # [groups]
        sizes.append(np.bincount(group[own], minlength=count))
    total = [float(size.sum()) for size in sizes]
    with_some = [int((size > 0).sum()) for size in sizes]
    value = min(float(parts[0].sum() / total[0]), 1.0)  # a sum of ones may be rounded up
    if min(with_some) < 2:
        return value, 0.0, 0.0
    off = [part - size * value for part, size in zip(parts, sizes, strict=True)]
    of_class = [
        some / (some - 1) * float(np.square(one).sum()) / size**2
        for some, one, size in zip(with_some, off, total, strict=True)
    ]
    shared = count / (count - 1) * float((off[0] * off[1]).sum()) / (total[0] * total[1])
    variance = max(sum(of_class) + 2 * shared, 0.0)
    spent = sum(one**2 / (some - 1) for one, some in zip(of_class, with_some, strict=True))
    return value, variance, sum(of_class) ** 2 / spent if spent else 0.0


def _on_logit_scale(value: float, deviation: float, freedom: float, confidence: float) -> Interval:
    from scipy.special import expit, logit
    from scipy.stats import t

    reach = t.ppf(0.5 + confidence / 2, freedom) * deviation / (value * (1 - value))
    return Interval(float(expit(logit(value) - reach)), float(expit(logit(value) + reach)))


def _newcombe(value: float, m: int, n: int, confidence: float) -> Interval:
    """The AUROCs that lie z standard errors from `value`, with the standard error that each of them would have itself:
    Hanley and McNeil's (1982), with (m + n) / 2 for both numbers where they differ."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    z, size = float(norm.ppf(0.5 + confidence / 2)), (m + n) / 2 - 1

    def variance(a: float) -> float:
        return a * (1 - a) * (1 + size * (1 - a) / (2 - a) + size * a / (1 + a)) / (m * n)

    def end(of: Callable[[float], float], low: float, high: float) -> float:
        return float(brentq(of, low, high, xtol=1e-9))

    # At 0 and at 1 the standard error is 0, which is not the root that is meant.
    low = end(lambda a: value - a - z * math.sqrt(variance(a)), 0.0, value * (1 - 1e-9)) if value > 0 else 0.0
    high = end(lambda a: value - a + z * math.sqrt(variance(a)), value + (1 - value) * 1e-9, 1.0) if value < 1 else 1.0
    return Interval(low, high)
