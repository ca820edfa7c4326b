"""Exact AUROC by ranks, for all latents of a sparse code at once.

torchmetrics passes scores outside [0, 1] through a sigmoid, which ties large ones, and scikit-learn takes dense scores, one
latent at a time; so it is written here, and tested against both definitions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def auroc(scores: Tensor, labels: Tensor) -> float | None:
    """How often a row of class 1 scores higher than a row of class 0, over all pairs, ties counting half (Hanley and McNeil
    1982). scores, labels: [n]; a label is 0, 1 or NaN (left out). None if a class has no rows."""
    n = torch.arange(len(scores), device=scores.device)
    value = float(auroc_of_latents(n, torch.zeros_like(n), scores, labels, 1)[0])
    return None if value != value else value


def auroc_of_latents(rows: Tensor, latents: Tensor, values: Tensor, labels: Tensor, d_sae: int) -> Tensor:
    """The AUROC of every latent of a code given by its active entries: [d_sae] float64, 0.5 for one that never fires.

    rows, latents, values: [nnz], each (row, latent) once; all other activations are zero, below every value here.
    labels: [n], NaN for a row that is left out. The result is NaN if a class has no rows. Memory grows with nnz.
    """
    known = ~labels.isnan()
    positive = known & (labels > 0.5)  # [n]
    n_pos, n_neg = int(positive.sum()), int((known & ~positive).sum())
    if not n_pos or not n_neg:
        return torch.full((d_sae,), torch.nan, dtype=torch.float64, device=values.device)
    kept = known[rows]
    rows, latents, values = rows[kept], latents[kept], values[kept]
    order = values.argsort()
    order = order[latents[order].argsort(stable=True)]  # by latent, and by value within it
    rows, latents, values = rows[order], latents[order], values[order]
    is_pos = positive[rows]  # [nnz]
    counted = (~is_pos).cumsum(0)
    below = torch.cat([counted.new_zeros(1), counted])  # rows of class 0 among the first i entries: [nnz + 1]
    start, end = _runs(latents)
    first, last = _runs(latents, values)
    per_pos = (below[first] - below[start]) + 0.5 * (below[last] - below[first])  # active rows of class 0 that score lower
    idle_neg = n_neg - (below[end] - below[start])  # rows of class 0 where the latent is silent: lower too
    wins = torch.zeros(d_sae, dtype=torch.float64, device=values.device)
    wins.index_add_(0, latents[is_pos], (per_pos + idle_neg)[is_pos].double())
    active_pos = torch.bincount(latents[is_pos], minlength=d_sae)
    active_neg = torch.bincount(latents[~is_pos], minlength=d_sae)
    wins += 0.5 * (n_pos - active_pos).double() * (n_neg - active_neg).double()  # both silent: a tie
    return wins / (n_pos * n_neg)


def _runs(*keys: Tensor) -> tuple[Tensor, Tensor]:
    """For each place of sorted keys [n], the beginning and the end of its run of equal keys: [n] each."""
    n = len(keys[0])
    new = torch.ones(n + 1, dtype=torch.bool, device=keys[0].device)
    if n > 1:
        new[1:n] = torch.stack([key[1:] != key[:-1] for key in keys]).any(0)
    bounds = new.nonzero().squeeze(1)  # starts of the runs, and n
    run = new[:n].cumsum(0) - 1
    return bounds[run], bounds[run + 1]
