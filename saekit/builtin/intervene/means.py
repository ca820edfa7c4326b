"""`ClusteredMeans`: means over rows that come in sequences, with intervals that know it, from one pass in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from saekit.intervals import Interval


class ClusteredMeans:
    """The mean of each column over each of several groups of rows, batch by batch.

    groups: how many groups; a row may be in several. columns: how many columns. A sequence's rows must be in one batch.

    The mean is the ratio of the sums of the sequences' totals s and of their numbers of rows n; its variance is
    G / (G - 1) * sum((s - mean * n)^2) / sum(n)^2 over the G sequences (Cochran 1977, 6.4), which needs the sums of s, s^2, s * n,
    n and n^2 alone. Memory: 24 bytes for each group and column.
    """

    def __init__(self, groups: int, columns: int, device: str | torch.device = "cpu") -> None:
        self._s, self._ss, self._sn = (torch.zeros(groups, columns, dtype=torch.float64, device=device) for _ in range(3))
        self._n, self._nn, self._sequences = (torch.zeros(groups, dtype=torch.float64, device=device) for _ in range(3))

    def update(self, values: Tensor, member: Tensor, sequence: Tensor) -> None:
        """values: [k, columns]. member: [groups, k] booleans. sequence: [k] numbers."""
        which = sequence.unique(return_inverse=True)[1]  # [k]
        count = int(which.max()) + 1 if len(which) else 0
        wide = values.double()
        for group, there in enumerate(member):
            total = wide.new_zeros(count, wide.shape[1]).index_add_(0, which[there], wide[there])  # [sequences, columns]
            rows = torch.bincount(which[there], minlength=count).double()  # [sequences]
            self._s[group] += total.sum(0)
            self._ss[group] += total.square().sum(0)
            self._sn[group] += rows @ total
            self._n[group] += rows.sum()
            self._nn[group] += rows.square().sum()
            self._sequences[group] += (rows > 0).sum()

    def rows(self, group: int) -> int:
        """How many rows the group has."""
        return int(self._n[group])

    def sequences(self, group: int) -> int:
        """How many sequences these rows are from."""
        return int(self._sequences[group])

    def mean(self, group: int) -> list[float | None]:
        """The mean of each column; None without rows."""
        n = self.rows(group)
        return (self._s[group] / n).tolist() if n else [None] * self._s.shape[1]

    def intervals(self, group: int, confidence: float = 0.95) -> list[Interval | None]:
        """The confidence interval of each mean, by Student's t with G - 1 degrees of freedom; None with fewer than two
        sequences."""
        from scipy.stats import t  # slow to import

        g, n = self.sequences(group), self.rows(group)
        if g < 2:
            return [None] * self._s.shape[1]
        mean = self._s[group] / n
        squares = self._ss[group] - 2 * mean * self._sn[group] + mean.square() * self._nn[group]
        error = (squares.clamp_min(0) * g / (g - 1)).sqrt() / n
        reach = float(t.ppf(0.5 + confidence / 2, g - 1))
        return [Interval(m - reach * e, m + reach * e) for m, e in zip(mean.tolist(), error.tolist(), strict=True)]
