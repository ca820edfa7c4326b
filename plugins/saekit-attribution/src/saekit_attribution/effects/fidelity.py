"""How closely estimated scores follow the exact effects of the same latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saekit_attribution.effects.methods import Attribution


@dataclass(frozen=True)
class Fidelity:
    """spearman, pearson: correlation of the estimate's scores with the exact ones over a sample's latents; None for fewer
    than three latents or if either side is constant. completeness_gap: the sum of the estimate's scores, its error's
    included, minus `moved`, in logits; 0 for a complete method (integrated gradients, as the steps grow). recall: of the
    latents with the largest exact effects, see `top_recall`; None where that is undefined."""

    spearman: float | None
    pearson: float | None
    completeness_gap: float
    recall: Recall | None = None


class Recall(NamedTuple):
    """share: of the exact first ones that are among the estimate's first ones. by_chance: what a random order would share."""

    share: float
    by_chance: float


def fidelity(estimate: Attribution, exact: Attribution, recall_at: int = 10) -> Fidelity:
    """Compare an estimate with the exact effects. ValueError if the two have different latents."""
    if not torch.equal(estimate.latents, exact.latents):
        raise ValueError("the estimate and the exact effects are not of the same latents")
    one, other = estimate.scores.double(), exact.scores.double()
    gap = float(one.sum()) + estimate.error - estimate.moved
    return Fidelity(spearman(one, other), pearson(one, other), gap, top_recall(one, other, recall_at))


def top_recall(estimate: Tensor, exact: Tensor, n: int) -> Recall | None:
    """How many of the `n` largest exact effects [m], by absolute value, are among the `n` largest estimates [m].

    Most latents have next to no effect, and a correlation over all of them says little about the few that matter. An effect
    that is exactly zero is not one of the largest, however few there are. None where every order would find them all
    (m <= n), where no effect is there to be found, and for values not finite."""
    largest = exact.abs().argsort(descending=True, stable=True)[:n]
    largest = largest[exact[largest] != 0]
    finite = bool(estimate.isfinite().all() & exact.isfinite().all())
    if len(exact) <= n or not len(largest) or not finite:
        return None
    found = estimate.abs().argsort(descending=True, stable=True)[:n]
    found = found[estimate[found] != 0]
    return Recall(float(torch.isin(largest, found).double().mean()), n / len(exact))


def spearman(one: Tensor, other: Tensor) -> float | None:
    """Spearman's rank correlation of two [m] tensors, ties at their mean rank; None if it is undefined (see `pearson`)."""
    from scipy.stats import spearmanr

    return float(spearmanr(one.numpy(), other.numpy()).statistic) if _defined(one, other) else None


def pearson(one: Tensor, other: Tensor) -> float | None:
    """Pearson's correlation of two [m] tensors; None for m < 3, for one that is constant, and for values not finite."""
    from scipy.stats import pearsonr

    return float(pearsonr(one.double().numpy(), other.double().numpy()).statistic) if _defined(one, other) else None


def _defined(one: Tensor, other: Tensor) -> bool:
    finite = bool(one.isfinite().all() & other.isfinite().all())
    return len(one) >= 3 and finite and not any(bool(t.min() == t.max()) for t in (one, other))
