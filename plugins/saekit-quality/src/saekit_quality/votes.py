"""What annotators' votes say of a response: targets, agreement, and weights against unequal classes.

Votes are [n, A, C]: n responses, A annotators, C criteria, each 0, 1 or NaN where it is missing. Targets are [n, C], NaN where
there is none; whoever trains or measures leaves these out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from saekit import UsageError

Floats = NDArray[np.floating[Any]]
Targets = Literal["soft", "hard"]


def counts(votes: Floats) -> tuple[Floats, Floats]:
    """How many annotators said yes, and how many said no: [n, C] each."""
    return (votes == 1).sum(1).astype(np.float64), (votes == 0).sum(1).astype(np.float64)


def soft_targets(votes: Floats) -> Floats:
    """The share of the votes that are yes: [n, C], NaN where nobody voted."""
    yes, no = counts(votes)
    return np.divide(yes, yes + no, out=np.full(yes.shape, np.nan), where=yes + no > 0)


def hard_targets(votes: Floats) -> Floats:
    """What most annotators said: [n, C], NaN where nobody voted, and where as many said yes as no."""
    yes, no = counts(votes)
    return np.where(yes == no, np.nan, (yes > no).astype(np.float64))


def targets_of(votes: Floats, kind: Targets) -> Floats:
    """`soft_targets` or `hard_targets`: [n, C]."""
    return soft_targets(votes) if kind == "soft" else hard_targets(votes)


def agreement(votes: Floats) -> Floats:
    """How far annotators agree: 1 if all say the same, 0 if as many say yes as no, and 1/3 for 2:1. [n, C], NaN without votes.

    UsageError if there is only one annotator, whom nobody can disagree with.
    """
    if votes.shape[1] < 2:
        raise UsageError("there is one annotator only, so nothing is known of agreement. Do not weight by agreement.")
    return np.abs(2 * soft_targets(votes) - 1)


def unanimous(votes: Floats) -> NDArray[np.bool_]:
    """Where at least two annotators voted and all said the same: [n, C]. UsageError with one annotator, as `agreement`."""
    yes, no = counts(votes)
    return (agreement(votes) == 1) & (yes + no > 1)


def constant(targets: Floats, criteria: Sequence[str]) -> dict[str, str]:
    """The criteria of which nothing can be learnt or measured, each with the reason."""
    found = {}
    for name, column in zip(criteria, targets.T, strict=True):
        known = column[~np.isnan(column)]
        if not len(known):
            found[name] = "no response has a label"
        elif (known == known[0]).all():
            found[name] = f"all {len(known)} responses have the label {known[0]:.3g}"
    return found


def pos_weight(targets: Floats) -> Floats:
    """What a yes must weigh in BCE for yes and no to weigh the same in total: [C]; 1 for a criterion without both."""
    yes, no = _totals(targets)
    return np.where((yes > 0) & (no > 0), no / np.where(yes > 0, yes, 1), 1.0)


def sampling_weights(targets: Floats) -> Floats:
    """How often to draw each response so that classes are seen more equally: [n], of mean 1.

    For each criterion a response weighs 1 / (2 share of its class), which balances that criterion exactly; its weight is the mean
    over the criteria that have both classes and in which it has a label. Several criteria cannot all be balanced at once.
    """
    yes, no = _totals(targets)
    both = (yes > 0) & (no > 0)  # [C]
    if not both.any():
        return np.ones(len(targets))
    t, yes, no = targets[:, both], yes[both], no[both]
    each = (t / yes + (1 - t) / no) * (yes + no) / 2  # [n, criteria with both], NaN without a label
    known = ~np.isnan(each)
    labels = known.sum(1)
    weights = np.where(labels > 0, np.where(known, each, 0.0).sum(1) / np.maximum(labels, 1), 1.0)
    return weights / weights.mean()


def _totals(targets: Floats) -> tuple[Floats, Floats]:
    """The sums of yes and of no over the responses with a label: [C] each."""
    return np.nansum(targets, 0), np.nansum(1 - targets, 0)
