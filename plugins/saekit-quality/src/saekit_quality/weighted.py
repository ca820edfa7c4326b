"""Metrics of one criterion under many weightings of its responses at once, as a bootstrap needs them.

scikit-learn and torchmetrics take one weighting at a time, or none. Tested against both. Everywhere scores, labels: [n], labels
0 or 1 (shares for `ece`); weights: [B, n], not negative. The result is [B] float64, NaN where a class is left without weight.
"""

from __future__ import annotations

import numpy as np

from saekit_quality.votes import Floats

BINS = 15
"""Bins of equal width from 0 to 1, as in Guo et al. 2017."""


def auroc(scores: Floats, labels: Floats, weights: Floats) -> Floats:
    """How often a yes scores higher than a no, over all pairs, ties counting half (Hanley and McNeil 1982)."""
    yes, no = _at_scores(scores, labels, weights)
    below = no.cumsum(1) - no
    with np.errstate(invalid="ignore", divide="ignore"):
        return (yes * (below + no / 2)).sum(1) / (yes.sum(1) * no.sum(1))


def average_precision(scores: Floats, labels: Floats, weights: Floats) -> Floats:
    """The sum over thresholds of precision times the recall that is gained there, without interpolation."""
    yes, no = (each[:, ::-1] for each in _at_scores(scores, labels, weights))  # from the highest score
    right, drawn = yes.cumsum(1), (yes + no).cumsum(1)
    precision = np.divide(right, drawn, out=np.zeros_like(right), where=drawn > 0)
    total = yes.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(no.sum(1) > 0, (yes * precision).sum(1) / total, np.nan)


def f1(scores: Floats, labels: Floats, weights: Floats) -> Floats:
    """2 right / (2 right + wrong), where scores of at least 0.5 are taken for a yes; 0 if nothing is right."""
    taken, yes = scores >= 0.5, labels > 0.5
    right = weights[:, taken & yes].sum(1)
    wrong = weights[:, taken != yes].sum(1)
    total = weights[:, yes].sum(1) * weights[:, ~yes].sum(1)
    found = np.divide(2 * right, 2 * right + wrong, out=np.zeros_like(right), where=right > 0)
    return np.where(total > 0, found, np.nan)


def ece(scores: Floats, labels: Floats, weights: Floats) -> Floats:
    """The mean distance between the mean probability and the share of yes within each bin, weighted by the bins' sizes. It is
    above 0 for perfect probabilities too, since shares within bins are from finite numbers; see the ceiling's own."""
    off = weights * (scores - labels)
    bins = bin_of(scores)
    apart = sum(np.abs(off[:, bins == b].sum(1)) for b in np.unique(bins))
    with np.errstate(invalid="ignore", divide="ignore"):
        return apart / weights.sum(1)


def bin_of(probabilities: Floats) -> np.ndarray:
    """The bin of each probability, 0 to `BINS` - 1."""
    return np.minimum((probabilities * BINS).astype(int), BINS - 1)


def _at_scores(scores: Floats, labels: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """The weight of yes and of no at each score that occurs, from the lowest: [B, scores] each."""
    order = np.argsort(scores, kind="stable")
    new = np.concatenate([[True], np.diff(scores[order]) > 0]) if len(scores) else np.zeros(0, bool)
    starts = new.nonzero()[0]
    weights, labels = weights[:, order], labels[order]
    return np.add.reduceat(weights * labels, starts, axis=1), np.add.reduceat(weights * (1 - labels), starts, axis=1)
