"""How far an estimate can be trusted: against the exact effects of the same latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saekit_attribution.effects.methods import Attribution


@dataclass(frozen=True)
class Fidelity:
    """spearman, pearson: of the estimate's scores with the exact ones over a sample's latents; None for fewer than three
    latents or where either side does not vary. completeness_gap: the estimate's scores and its error's score, added up,
    less `moved`, in logits; 0 for a method that accounts for all (integrated gradients, as the steps grow)."""

    spearman: float | None
    pearson: float | None
    completeness_gap: float


def fidelity(estimate: Attribution, exact: Attribution) -> Fidelity:
    """The estimate beside the exact effects. ValueError where the two are not of the same latents."""
    if not torch.equal(estimate.latents, exact.latents):
        raise ValueError("the estimate and the exact effects are not of the same latents")
    one, other = estimate.scores.double(), exact.scores.double()
    gap = float(one.sum()) + estimate.error - estimate.moved
    pearson = correlation(one, other)
    return Fidelity(None if pearson is None else correlation(ranks(one), ranks(other)), pearson, gap)


def correlation(one: Tensor, other: Tensor) -> float | None:
    """Pearson's correlation of two [m] tensors; None for m < 3, for one that does not vary, and for what is not finite."""
    if len(one) < 3 or not bool(one.isfinite().all() & other.isfinite().all()):
        return None
    if bool(one.min() == one.max()) or bool(other.min() == other.max()):
        return None
    one, other = (values - values.mean() for values in (one.double(), other.double()))
    one, other = one / one.abs().max(), other / other.abs().max()  # so that no square underflows
    return float((one @ other / (one.norm() * other.norm())).clamp(-1, 1))


def ranks(values: Tensor) -> Tensor:
    """The place of each of [m] values in ascending order, from 0; ties share the mean of their places."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1
    return (last - (counts.double() - 1) / 2)[inverse]
