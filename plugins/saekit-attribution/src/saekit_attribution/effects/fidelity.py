"""How closely estimated scores follow the exact effects of the same latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saekit_attribution.effects.methods import Attribution


@dataclass(frozen=True)
class Fidelity:
    """spearman, pearson: correlation of the estimate's scores with the exact ones over a sample's latents; None for fewer
    than three latents or if either side is constant. completeness_gap: the sum of the estimate's scores, its error's
    included, minus `moved`, in logits; 0 for a complete method (integrated gradients, as the steps grow)."""

    spearman: float | None
    pearson: float | None
    completeness_gap: float


def fidelity(estimate: Attribution, exact: Attribution) -> Fidelity:
    """Compare an estimate with the exact effects. ValueError if the two have different latents."""
    if not torch.equal(estimate.latents, exact.latents):
        raise ValueError("the estimate and the exact effects are not of the same latents")
    one, other = estimate.scores.double(), exact.scores.double()
    gap = float(one.sum()) + estimate.error - estimate.moved
    return Fidelity(spearman(one, other), pearson(one, other), gap)


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
