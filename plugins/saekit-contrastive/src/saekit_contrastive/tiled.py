"""The contrastive loss of many rows, a few rows at a time: memory grows with their number, not with its square."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEFT_OUT = -1
"""The group of a row that is left out, both as an anchor and in the denominator of others."""
_TILE = 1 << 22  # similarities held at a time


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
    if z.dtype in (torch.float16, torch.bfloat16):
        z = z.float()
    others = (z if bank is None else torch.cat([z, bank.to(z)])).detach()  # [n + m, d]
    all_groups = groups if bank_groups is None else torch.cat([groups, bank_groups])
    with torch.autocast(z.device.type, enabled=False):
        return _Contrastive.apply(z, others, groups, all_groups, temperature, decoupled, tile)


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        others: Tensor,
        groups: Tensor,
        all_groups: Tensor,
        temperature: float,
        decoupled: bool,
        tile: int | None,
    ) -> Tensor:
        n, m = len(z), len(others)
        z = z.detach()
        weights, positives = _row_weights(groups, all_groups, decoupled)  # [n, c] each
        grad = torch.zeros_like(z) if ctx.needs_input_grad[0] else None
        loss = z.new_zeros(())
        step = tile or max(1, _TILE // m)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            similarity = z[rows] @ others.t() / temperature  # [t, m]
            value, slope = _tile_loss(
                similarity, start, groups[rows], all_groups, weights[rows], positives[rows], decoupled
            )
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
        return upstream * grad, None, None, None, None, None, None


def _row_weights(groups: Tensor, all_groups: Tensor, decoupled: bool) -> tuple[Tensor, Tensor]:
    """The weight of each row of each column in the mean, 0 where it is left out, and its number of positives: [n, c] float64."""
    n = len(groups)
    weights, positives = [], []
    for column, all_column in zip(groups.unbind(1), all_groups.unbind(1), strict=True):
        _, place, counts = all_column.unique(return_inverse=True, return_counts=True)
        same = counts[place[:n]] - 1  # [n], without the row itself
        known = int((all_column != LEFT_OUT).sum())
        kept = (column != LEFT_OUT) & (same > 0)
        if decoupled:
            kept &= same + 1 < known
        weights.append(kept.double() / kept.sum().clamp_min(1))
        positives.append(same.clamp_min(1).double())
    stacked = torch.stack(weights, 1)  # [n, c]
    columns = stacked.any(0).sum().clamp_min(1)
    return stacked / columns, torch.stack(positives, 1)


def _tile_loss(
    similarity: Tensor,
    start: int,
    groups: Tensor,
    all_groups: Tensor,
    weights: Tensor,
    positives: Tensor,
    decoupled: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted loss of some rows, and its gradient with respect to their similarities [t, m]. A row is never compared
    with itself: it is taken out before the maximum that stabilises the exponentials."""
    t = len(similarity)
    own = torch.arange(t, device=similarity.device)
    slope = torch.zeros_like(similarity)
    loss = similarity.new_zeros(())
    for c in range(groups.shape[1]):
        weight, count = weights[:, c].to(similarity), positives[:, c].to(similarity)  # [t] each
        same = groups[:, c, None] == all_groups[None, :, c]  # [t, m]
        same[own, start + own] = False
        left_out = (all_groups[None, :, c] == LEFT_OUT).expand(t, -1) | (same if decoupled else torch.zeros_like(same))
        left_out[own, start + own] = True
        logits = similarity.masked_fill(left_out, -torch.inf)
        total = logits.logsumexp(1)  # [t]
        total = torch.where(weight > 0, total, 0.0)
        alike = similarity.masked_fill(~same, 0.0).sum(1) / count  # [t]
        loss += (weight * torch.where(weight > 0, total - alike, 0.0)).sum()
        share = torch.exp(logits - total[:, None])
        share -= same / count[:, None]
        slope += torch.where(weight > 0, weight, 0.0)[:, None] * share.masked_fill_((weight == 0)[:, None], 0.0)
    return loss, slope
