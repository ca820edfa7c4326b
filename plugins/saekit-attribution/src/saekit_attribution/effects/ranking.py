"""`Ranking`: the latents ordered by their mean score over a data set, with the spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saekit_attribution.effects.fidelity import spearman
from saekit_attribution.effects.methods import Attribution


@dataclass(frozen=True)
class Ranking:
    """Latents by their mean score, largest first: those that promote the target most lead.

    latents: [m] int64.
    scores: [m], the mean over all samples, in logits; a sample in which the latent is not active counts as zero.
    spread: [m], the standard deviation over samples.
    share: [m], of the samples in which it is active.
    activations: [m], the mean summed activation.
    """

    latents: Tensor
    scores: Tensor
    spread: Tensor
    share: Tensor
    activations: Tensor

    def top(self, n: int) -> list[int]:
        """The first `n` latents with a score above zero, or as many as there are."""
        return self.latents[self.scores > 0][:n].tolist()


def ranked(attributions: Sequence[Attribution]) -> Ranking:
    """The ranking by one method's attributions, one for each sample. ValueError without any."""
    if not attributions:
        raise ValueError("there is nothing to rank: no sample was attributed")
    every = torch.cat([a.latents for a in attributions])
    latents, place = every.unique(return_inverse=True)
    samples = len(attributions)

    def mean(values: list[Tensor]) -> Tensor:
        joined = torch.cat(values).double()
        return joined.new_zeros(len(latents)).index_add(0, place, joined) / samples

    scores = mean([a.scores for a in attributions])
    squares = mean([a.scores.double().square() for a in attributions])
    spread = (squares - scores.square()).clamp_min(0).sqrt()
    share = torch.bincount(place, minlength=len(latents)).double() / samples
    activations = mean([a.activations for a in attributions])
    order = scores.argsort(descending=True, stable=True)
    return Ranking(latents[order], scores[order], spread[order], share[order], activations[order])


def by_weight(attribution: Attribution) -> Attribution:
    """The attribution with `weighted` as its scores. ValueError for exact effects, which have none."""
    if attribution.weighted is None:
        raise ValueError("exact effects belong to whole activations: there is nothing to weight")
    return replace(attribution, scores=attribution.weighted)


def agreement(one: Ranking, other: Ranking) -> float | None:
    """Spearman's correlation of two rankings' scores over the latents of either, absent ones at zero; None if it is
    undefined (see `spearman`)."""
    latents = torch.cat([one.latents, other.latents]).unique()
    columns = [_spread_over(latents, ranking) for ranking in (one, other)]
    return spearman(*columns)


def _spread_over(latents: Tensor, ranking: Ranking) -> Tensor:
    """The ranking's scores in the order of `latents` [m], which is ascending and contains all of the ranking's: [m]."""
    return ranking.scores.new_zeros(len(latents)).index_copy(
        0, torch.searchsorted(latents, ranking.latents), ranking.scores
    )
