"""The contrastive loss of many rows, a few rows at a time: memory grows with their number, not with its square."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEFT_OUT = -1
"""The group of a row that is left out, both as an anchor and in the denominator of others."""
_TILE = 1 << 22  # similarities held at a time


class Pairs(Protocol):
    """How n rows, the anchors, are compared with all m rows, of which they are the first n: computed a few anchors at a time."""

    columns: int

    def tile(self, rows: slice, column: int) -> tuple[Tensor, Tensor]:
        """The weight of each pair as a positive, not negative, and what is added to its similarity in the denominator, the
        logarithm of its weight there (-inf: not compared): [t, m], the second also [1, m]. Both are new: they are changed here.
        What a row has with itself is not read."""
        ...


def contrastive_loss(
    z: Tensor,
    groups: Tensor,
    *,
    temperature: float,
    decoupled: bool = False,
    bank: Tensor | None = None,
    bank_groups: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """How similar rows of one group are compared with rows of other groups, as a scalar (Khosla et al. 2020, eq. 2).

        loss_i = -mean over positives p of z_i . z_p / t + log sum over j != i of exp(z_i . z_j / t)

    averaged over the rows that have a positive, then over the columns of groups that have such rows. With two rows per
    group it is NT-Xent (Chen et al. 2020). decoupled: the sum leaves out positives (Yeh et al. 2022, eq. 6), and rows without
    negatives are left out too. Zero if no row is left.

    z: [n, d] of norm 1.
    groups: [n, c] int64, a column for each way to group rows; `LEFT_OUT` for rows to leave out.
    bank, bank_groups: [m, d] and [m, c], more rows to compare with, without a gradient.
    tile: rows at a time.

    The gradient is computed in the forward pass, while each row's similarities are there; no [n, n] tensor is ever held.
    """
    z = _full_precision(z)
    others = (z if bank is None else torch.cat([z, bank.to(z)])).detach()  # [n + m, d]
    all_groups = groups if bank_groups is None else torch.cat([groups, bank_groups])
    return _loss(z, others, _Groups(groups, all_groups, decoupled, z.dtype), temperature, tile)


def weighted_contrastive_loss(z: Tensor, pairs: Pairs, *, temperature: float, tile: int | None = None) -> Tensor:
    """How similar rows are where a pair weighs w_ij as a positive and b_ij in the denominator, as a scalar.

        loss_i = -sum over j of w_ij / (sum over k of w_ik) * z_i . z_j / t + log sum over j != i of b_ij exp(z_i . z_j / t)

    averaged over the rows with a positive (any w_ij above 0), then over the columns that have such rows; zero if no row is left.
    With weights of 0 and 1 it is `contrastive_loss`. The weights are normalised for each anchor, so that one with many
    positives counts as much as one with few.

    z: [n, d] of norm 1.
    pairs: gives the weights for a few rows at a time, from what is known of each row; no [n, n] tensor is ever held.
    tile: rows at a time.
    """
    z = _full_precision(z)
    return _loss(z, z.detach(), pairs, temperature, tile)


def _full_precision(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _loss(z: Tensor, others: Tensor, pairs: Pairs, temperature: float, tile: int | None) -> Tensor:
    with torch.autocast(z.device.type, enabled=False):
        return _Contrastive.apply(z, others, pairs, temperature, tile)


class _Groups:
    """The pairs of rows of one group, by the groups' names alone."""

    def __init__(self, groups: Tensor, all_groups: Tensor, decoupled: bool, dtype: torch.dtype) -> None:
        self.groups, self.all_groups, self.decoupled, self.dtype = groups, all_groups, decoupled, dtype
        self.columns = groups.shape[1]

    def tile(self, rows: slice, column: int) -> tuple[Tensor, Tensor]:
        known = self.all_groups[None, :, column]  # [1, m]
        same = self.groups[rows, column, None] == known  # [t, m]
        same &= known != LEFT_OUT
        left_out = (known == LEFT_OUT) | same if self.decoupled else known == LEFT_OUT
        return same, torch.zeros_like(left_out, dtype=self.dtype).masked_fill_(left_out, -torch.inf)


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        others: Tensor,
        pairs: Pairs,
        temperature: float,
        tile: int | None,
    ) -> Tensor:
        n, m = len(z), len(others)
        z = z.detach()
        grad = torch.zeros_like(z) if ctx.needs_input_grad[0] else None
        loss = z.new_zeros(())
        step = tile or max(1, _TILE // max(m, 1))
        tiles = [slice(start, min(start + step, n)) for start in range(0, n, step)]
        totals = torch.cat([_totals(pairs, rows) for rows in tiles] or [z.new_zeros(0, pairs.columns)])  # [n, c]
        kept = totals > 0
        weights = kept.double() / kept.sum(0).clamp_min(1) / kept.any(0).sum().clamp_min(1)  # [n, c], of each row in the mean
        for rows in tiles:
            similarity = z[rows] @ others.t() / temperature  # [t, m]
            value, slope = _tile_loss(similarity, rows, pairs, weights[rows], totals[rows])
            loss += value
            if grad is not None:
                slope /= temperature  # of the loss, to the similarities before the temperature
                grad[rows].addmm_(slope, others)
                grad.addmm_(slope[:, :n].t(), z[rows])  # in place: a separate product would be as large as z
        if grad is not None:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return upstream * grad, None, None, None, None


def _totals(pairs: Pairs, rows: slice) -> Tensor:
    """The sum of each anchor's weights in each column, 0 where it has no positive or nothing to compare with: [t, c]."""
    totals = []
    for c in range(pairs.columns):
        positive, factor = _without_itself(*pairs.tile(rows, c), rows)
        totals.append(positive.sum(1) * (factor > -torch.inf).any(1))
    return torch.stack(totals, 1)


def _without_itself(positive: Tensor, factor: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """No row is compared with itself; taken out before the maximum that stabilises the exponentials."""
    t, m = positive.shape
    own = torch.arange(t, device=positive.device)
    positive[own, rows.start + own] = 0
    factor = factor.expand(t, m).clone() if len(factor) != t else factor
    factor[own, rows.start + own] = -torch.inf
    return positive, factor


def _tile_loss(
    similarity: Tensor, rows: slice, pairs: Pairs, weights: Tensor, totals: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted loss of some rows, and its gradient with respect to their similarities [t, m]."""
    slope = torch.zeros_like(similarity)
    loss = similarity.new_zeros(())
    totals = totals.to(similarity).masked_fill(totals == 0, 1.0)
    for c in range(pairs.columns):
        weight = weights[:, c].to(similarity)  # [t]
        positive, factor = _without_itself(*pairs.tile(rows, c), rows)
        share = positive / totals[:, c, None]  # [t, m], of sum 1
        logits = similarity + factor  # [t, m]
        total = torch.where(weight > 0, logits.logsumexp(1), 0.0)  # [t]
        alike = (share * similarity).sum(1)  # [t]
        loss += (weight * torch.where(weight > 0, total - alike, 0.0)).sum()
        softmax = torch.exp(logits - total[:, None])
        softmax -= share
        slope += weight[:, None] * softmax.masked_fill_((weight == 0)[:, None], 0.0)
    return loss, slope
