"""Labelled rows of activations, and which unit (latent or neuron) of them tells a concept best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saekit import ComponentError, auroc_of_latents

if TYPE_CHECKING:
    from saekit import Activations, SparseAutoencoder

_ROWS = 2048  # rows encoded at a time


@dataclass
class LabelledRows:
    """x: [n, d_in]. labels: [n, n_concepts], NaN if unknown. sequence: [n], what rows are independent between."""

    x: Tensor
    labels: Tensor
    sequence: Tensor

    @classmethod
    def of(cls, batches: Iterable[Activations]) -> LabelledRows:
        """All rows of some batches that have a label. ComponentError if none has."""
        x, labels, sequence, rows = [], [], [], 0
        for batch in batches:
            if batch.labels is None:
                continue
            known = ~batch.labels.isnan().all(1)
            own = torch.arange(rows, rows + len(batch), device=batch.x.device) if batch.sequence is None else batch.sequence
            rows += len(batch)
            x.append(batch.x[known])
            labels.append(batch.labels[known])
            sequence.append(own.to(batch.x.device)[known])
        if not sum(map(len, x)):
            raise ComponentError("none of the activations has a label. Raise tokens, or label more of the data.")
        return cls(torch.cat(x).float(), torch.cat(labels), torch.cat(sequence))

    def occurs(self, column: int) -> bool:
        """Whether a concept is there in some rows and not in others."""
        labels = self.labels[:, column]
        return bool((labels > 0.5).any() and (labels <= 0.5).any())


class Entries(NamedTuple):
    """Units at rows, as entries: rows, units, values [nnz]; whatever is not named is 0 and below every value. n: of units."""

    rows: Tensor
    units: Tensor
    values: Tensor
    n: int

    def column(self, unit: int, rows: int) -> Tensor:
        """One unit at each row: [rows]."""
        own = self.units == unit
        return self.values.new_zeros(rows).index_put_((self.rows[own],), self.values[own])


@torch.no_grad()
def latents_of(sae: SparseAutoencoder, x: Tensor) -> Entries:
    """The latents at the rows of x [n, d_in]."""

    def parts() -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, len(x), _ROWS):
            row, latent, value = sae.encode(x[start : start + _ROWS]).nonzero()
            yield row + start, latent, value

    rows, latents, values = (torch.cat(found) for found in zip(*parts(), strict=True))
    return Entries(rows, latents, values, sae.d_sae)


class Best(NamedTuple):
    """The unit that tells a concept best on some rows, and the sign with which it does. auroc: there."""

    unit: int
    sign: float
    auroc: float


def best_latent(entries: Entries, labels: Tensor, *, against: bool) -> Best:
    """The latent with the highest AUROC for labels [n]. against: it may also fire against them."""
    found = auroc_of_latents(entries.rows, entries.units, entries.values, labels, entries.n)
    return _best(found, against)


def best_neuron(ranks: Tensor, labels: Tensor) -> Best:
    """The neuron with the highest AUROC for labels [n], or for their opposite.

    ranks: [n, d], those of the values of each neuron, with ties averaged; labels have no NaN. The AUROC of a column is
    (R - m (m + 1) / 2) / (m k), for the sum R of the ranks of its m rows of class 1, beside k of class 0 (Mann and Whitney
    1947)."""
    positive = (labels > 0.5).to(ranks)
    m = float(positive.sum())
    found = (positive @ ranks - m * (m + 1) / 2) / (m * (len(labels) - m))
    return _best(found, against=True)


def ranks_of(x: Tensor) -> Tensor:
    """The ranks of each column of x [n, d], from 1, with ties averaged: [n, d] float64."""
    from scipy.stats import rankdata  # slow to import

    return torch.from_numpy(rankdata(x.cpu().numpy(), axis=0)).to(x.device)


def _best(found: Tensor, against: bool) -> Best:
    unit = int((found - 0.5).abs().argmax() if against else found.argmax())
    sign = -1.0 if found[unit] < 0.5 and against else 1.0
    return Best(unit, sign, float(found[unit] if sign > 0 else 1 - found[unit]))
