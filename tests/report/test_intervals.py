from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import norm, t

from saekit import auroc_interval, wilson_interval


def test_a_share_has_wilsons_interval() -> None:
    z, k, n = norm.ppf(0.975), 18, 20
    centre, reach = (k + z**2 / 2) / (n + z**2), z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
    assert wilson_interval(k, n) == pytest.approx((centre - reach, centre + reach))
    assert wilson_interval(0, 20).low == 0.0 and wilson_interval(20, 20).high == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(5, 10, 0.5).low > wilson_interval(5, 10).low


def directly(scores, labels, groups) -> tuple[float, float, float]:
    """AUROC, Obuchowski's variance and Welch's degrees of freedom, written as in the paper: one pair after another."""
    pos, neg = ([i for i, y in enumerate(labels) if y == c] for c in (1, 0))
    psi = {(i, j): (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i, j in itertools.product(pos, neg)}
    value = sum(psi.values()) / len(psi)
    every = sorted(set(groups))
    sums = []
    for own, others in ((pos, neg), (neg, pos)):
        rows = {}
        for g in every:
            mine = [i for i in own if groups[i] == g]
            found = [sum(psi[(i, j) if own is pos else (j, i)] for j in others) / len(others) for i in mine]
            rows[g] = (sum(found), len(mine))
        sums.append(rows)
    parts, m, n = [], len(pos), len(neg)
    for rows, size in zip(sums, (m, n), strict=True):
        some = sum(count > 0 for _, count in rows.values())
        parts.append((some / ((some - 1) * size) * sum((v - count * value) ** 2 for v, count in rows.values()) / size, some))
    cross = sum((sums[0][g][0] - sums[0][g][1] * value) * (sums[1][g][0] - sums[1][g][1] * value) for g in every)
    cross *= len(every) / (len(every) - 1)
    variance = parts[0][0] + parts[1][0] + 2 * cross / (m * n)
    freedom = (parts[0][0] + parts[1][0]) ** 2 / sum(part**2 / (some - 1) for part, some in parts)
    return value, variance, freedom


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mixed", [False, True])
def test_the_interval_is_that_of_a_slow_direct_computation(seed: int, mixed: bool) -> None:
    draws = np.random.default_rng(seed)
    groups = draws.permutation(np.repeat(np.arange(24), 3)) * 7 - 3
    labels = draws.integers(0, 2, 72) if mixed else (groups % 2).astype(float)
    scores = draws.integers(0, 6, 72) + labels  # ties abound
    value, variance, freedom = directly(scores.tolist(), labels.tolist(), groups.tolist())
    reach = t.ppf(0.975, freedom) * math.sqrt(variance) / (value * (1 - value))
    assert auroc_interval(scores, labels, groups) == pytest.approx((expit(logit(value) - reach), expit(logit(value) + reach)))
    with_unknown = np.concatenate([labels, [np.nan]])
    again = auroc_interval(np.append(scores, 9), with_unknown, np.append(groups, 0))
    assert again == pytest.approx(auroc_interval(scores, labels, groups))


@pytest.mark.parametrize("groups", [4, 8, 16, 40])
@pytest.mark.parametrize("true", [0.5, 0.95])
def test_it_covers_the_truth_as_often_as_it_says(groups: int, true: float) -> None:
    """Sequences of four positions that share half of their variance, each of one class."""
    draws, hits, n = np.random.default_rng(groups), 0, 60
    group = np.repeat(np.arange(groups), 4)
    labels = group % 2
    for _ in range(n):
        noise = draws.standard_normal(groups)[group] + draws.standard_normal(len(group))
        found = auroc_interval(noise / math.sqrt(2) + norm.ppf(true) * math.sqrt(2) * labels, labels, group)
        hits += found.low <= true <= found.high
    assert hits / n >= 0.9


def test_many_positions_of_few_sequences_tell_no_more_than_the_sequences() -> None:
    draws = np.random.default_rng(0)
    group = np.repeat(np.arange(24), 50)
    scores, labels = draws.standard_normal(24)[group], group % 2
    clustered = auroc_interval(scores, labels, group)
    as_if_independent = auroc_interval(scores, labels, np.arange(len(group)))
    assert clustered == pytest.approx(auroc_interval(scores[::50], labels[::50], group[::50]))
    assert clustered.high - clustered.low > 5 * (as_if_independent.high - as_if_independent.low)


@pytest.mark.parametrize(("each", "low"), [(2, 0.386), (8, 0.756), (50, 0.960)])
def test_a_perfect_auroc_is_as_certain_as_there_are_groups(each: int, low: float) -> None:
    labels = np.repeat([0, 1], each)
    assert auroc_interval(labels, labels, np.arange(2 * each)) == pytest.approx((low, 1.0), abs=1e-3)
    assert auroc_interval(-labels, labels, np.arange(2 * each)) == pytest.approx((0.0, 1 - low), abs=1e-3)


def test_few_groups_widen_the_interval_and_a_missing_class_leaves_none() -> None:
    labels = np.array([1, 1, 0, 0])
    narrow, wide = auroc_interval([4, 3, 2, 3], labels, [0, 0, 1, 1]), auroc_interval([4, 3, 2, 3], labels, [0, 1, 2, 3])
    assert narrow.low < 0.5 < narrow.high == pytest.approx(1.0, abs=0.02) and wide.low < 0.5
    assert auroc_interval([1.0, 2.0], [1, 1], [0, 1]) is None
    assert auroc_interval([1.0, 1.0, 1.0], [1, 0, np.nan], [0, 1, 2]).low < 0.5
