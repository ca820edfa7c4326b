"""Which responses belong together, by what their annotators said: weights of pairs, computed a few rows at a time."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from saekit import OptionError

Rule = Literal["majority", "agreement", "ordinal", "unanimous", "jaccard"]
Empty = Literal["apart", "together"]


class VotePairs:
    """The pairs of responses by their shares p of "yes", from 0 to 1; `saekit_contrastive.tiled.Pairs`.

    Weights w_ij of a pair as a positive, in each criterion:

    - majority: 1 where the majorities are the same; ties are left out. The seed's first strategy; one label of hard votes is
      supervised contrastive learning (Khosla et al. 2020).
    - agreement: max(0, (2 p_i - 1)(2 p_j - 1)): how much more often than not an annotator of i and one of j agree.
    - ordinal: 1 - |p_i - p_j|, by the distance of the votes.
    - unanimous: the seed's second strategy. 1 where everyone says yes to both. Split votes are hard negatives, which weigh
      `hard_weight` in the denominator, and unanimous "no" easy ones, which weigh 1.

    or over all criteria at once:

    - jaccard: sum over criteria of min(p_i, p_j), over the sum of max(p_i, p_j); the Jaccard index where votes are hard. Of
      criteria that both were asked about. Two responses of which nobody says yes to anything have nothing in common by which to
      compare them: 0 (`empty="apart"`, so that such a row has no positive and is only a negative of others), or 1 (`"together"`).

    A response with no votes in a criterion is left out there, as an anchor and in the denominator of others.

    share: [n, criteria], NaN where there are no votes.
    """

    def __init__(self, share: Tensor, rule: Rule, *, hard_weight: float = 2.0, empty: Empty = "apart") -> None:
        if rule not in get_args(Rule):
            raise OptionError("pairs", f"'{rule}' is none of {', '.join(get_args(Rule))}.")
        self.rule, self.empty, self.log_hard = rule, empty, math.log(hard_weight)
        self.known = ~share.isnan()  # [n, criteria]
        self.share = share.nan_to_num(0.0)
        self.columns = 1 if rule == "jaccard" else share.shape[1]

    def tile(self, rows: slice, column: int) -> tuple[Tensor, Tensor]:
        """The weights of some rows' pairs and the logarithms of their weights in the denominator: [t, n], or [1, n]."""
        if self.rule == "jaccard":
            return self._jaccard(rows)
        p, known = self.share[:, column], self.known[:, column]
        if self.rule == "majority":
            known = known & (p != 0.5)
        log_factor = torch.zeros_like(p).masked_fill(~known, -torch.inf)  # [n]
        if self.rule == "unanimous":
            log_factor += self.log_hard * ((p > 0) & (p < 1))
        weights = self._weights(p[rows, None], p[None]) * (known[rows, None] & known[None])
        return weights, log_factor[None]

    def _weights(self, p: Tensor, q: Tensor) -> Tensor:
        """Of pairs of responses with shares p: [t, 1] and q: [1, n]."""
        if self.rule == "majority":
            return ((p > 0.5) == (q > 0.5)).to(p)
        if self.rule == "agreement":
            return ((2 * p - 1) * (2 * q - 1)).clamp_min(0)
        if self.rule == "ordinal":
            return 1 - (p - q).abs()
        return ((p == 1) & (q == 1)).to(p)

    def _jaccard(self, rows: slice) -> tuple[Tensor, Tensor]:
        both = self.share.new_zeros(len(self.share[rows]), len(self.share))  # [t, n]
        either, asked = both.clone(), torch.zeros_like(both, dtype=torch.bool)
        for p, known in zip(self.share.unbind(1), self.known.unbind(1), strict=True):  # never [t, n, criteria]
            common = known[rows, None] & known[None]
            both += torch.minimum(p[rows, None], p[None]) * common
            either += torch.maximum(p[rows, None], p[None]) * common
            asked |= common
        nothing = 1.0 if self.empty == "together" else 0.0
        weights = torch.where(either > 0, both / either.clamp_min(1e-12), nothing) * asked
        return weights, torch.zeros_like(weights).masked_fill_(~asked, -torch.inf)
