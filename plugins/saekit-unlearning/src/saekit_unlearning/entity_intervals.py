"""Intervals of shares and of the score, resampled by entity: the questions about one entity stand or fall together."""

from __future__ import annotations

import numpy as np

from saekit import Interval, wilson_interval
from saekit_unlearning.data import FORGET
from saekit_unlearning.measure import Outcome

DRAWS = 2000


def intervals(outcome: Outcome, seed: int, confidence: float = 0.95) -> tuple[dict[str, Interval], Interval]:
    """The intervals of the share still right in each group, and of the score (1 - forget) * least_retained.

    Percentiles of a bootstrap that draws entities, each with all its questions (Davison and Hinkley 1997, section 3.8). Where all
    entities of a group give the same share it has no spread; then the interval is Wilson's with entities as the trials."""
    draws, rng = dict[str, np.ndarray](), np.random.default_rng(seed)
    shares: dict[str, Interval] = {}
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    for group, right in outcome.right.items():
        asked, n = outcome.questions[group], len(right)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS)  # [draws, entities]
        draws[group] = (weights @ right) / (weights @ asked)
        found = Interval(*np.quantile(draws[group], tails).tolist())
        share = right.sum() / asked.sum()
        shares[group] = found if found.low < found.high else wilson_interval(round(share * n), n, confidence)
    retained = [draws[group] for group in draws if group != FORGET]
    score = (1 - draws[FORGET]) * (np.min(retained, axis=0) if retained else 1.0)
    low, high = np.quantile(score, tails).tolist()
    if low == high:
        least = [shares[group] for group in shares if group != FORGET] or [Interval(1.0, 1.0)]
        low = (1 - shares[FORGET].high) * min(one.low for one in least)
        high = (1 - shares[FORGET].low) * min(one.high for one in least)
    return shares, Interval(low, high)
