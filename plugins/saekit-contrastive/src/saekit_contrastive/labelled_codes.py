"""The codes of labelled sequences, kept for measures that need all of them at once."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saekit import RunContext
    from saekit.protocols import Source

_BATCH = 16  # sequences asked for at a time
_ROWS = 2048  # positions encoded at a time
_ENTRIES = 4_000_000  # active entries of codes kept
_KNOWN: weakref.WeakKeyDictionary[Any, dict[tuple, tuple[Tensor, Tensor, Tensor, Tensor]]] = weakref.WeakKeyDictionary()
# by source: all variants of a run are measured on the same positions, which are harvested once


@dataclass
class LabelledCodes:
    """n positions of n_sequences sequences, with their gated code.

    x: [n, d_in], the SAE's input.
    sequence: [n].
    labels: [n_sequences, n_concepts].
    position_labels: [n, n_concepts].
    columns: [n] activations of some latents.
    rebuilt: [n, d_out], the reconstruction.
    pooled_code: [n_sequences, d_sae], mean activations.
    sums: [3, d_sae] float64: of each latent's activations, of their squares, and how often it fires.
    some: [s] positions with their whole code.
    rows, latents, values: its active entries, rows being places in `some`.
    """

    x: Tensor
    sequence: Tensor
    labels: Tensor
    position_labels: Tensor
    columns: dict[int, Tensor]
    rebuilt: Tensor
    pooled_code: Tensor
    sums: Tensor
    some: Tensor
    rows: Tensor
    latents: Tensor
    values: Tensor

    def of_tokens(self, column: int) -> Tensor:
        """The label of each position: [n]."""
        return self.position_labels[:, column]

    def pooled(self, scores: Tensor) -> Tensor:
        """The mean of scores [n] over the positions of each sequence: [n_sequences]."""
        return scores.new_zeros(len(self.labels)).index_add_(0, self.sequence, scores) / _lengths(
            self.sequence, self.labels
        )

    def deviations(self) -> Tensor:
        """The standard deviation of each latent's activation over the positions: [d_sae] float64."""
        mean, square = self.sums[:2] / len(self.x)
        return (square - mean.square()).clamp_min(0).sqrt()


@torch.no_grad()
def encode_labelled(context: RunContext, split: str, chosen: Iterable[int], *, sequences: int, tokens: int) -> LabelledCodes:
    """Encode at most `sequences` sequences, and about `tokens` positions, of a split.

    chosen: latents whose activations are kept at every position. Whole codes are kept at evenly spread positions with
        about 4 million active entries in all: at every position if the code is sparse.

    From "held_out" they are taken all over the split, which may be sorted by kind. Positions that are not finite are left
    out, with a warning; a sequence without any other has no label then."""
    known = _KNOWN.setdefault(context.source, {})
    key = (split, sequences, tokens, context.seed)
    if key not in known:
        known[key] = _positions(context.source, *key)
    x, sequence, labels, of_positions = known[key]
    finite = x.isfinite().all(1)  # [n]
    if not finite.all():
        context.warn(
            f"{int((~finite).sum()):,} of {len(x):,} activations of labelled sequences of the split {split!r} are not finite; "
            "they are left out."
        )
        x, sequence, of_positions = x[finite], sequence[finite], of_positions[finite]
        empty = torch.bincount(sequence, minlength=len(labels)) == 0
        labels = labels.masked_fill(empty[:, None], torch.nan)
    x = x * context.scale  # [n, d_in]
    d_sae, columns = context.sae.d_sae, torch.tensor(list(chosen), device=x.device)
    pooled = x.new_zeros(len(labels) * d_sae)
    sums = torch.zeros(3, d_sae, dtype=torch.float64, device=x.device)
    picked, rebuilt, kept, step = [], [], [], 0
    some: list[Tensor] = []
    for start in range(0, len(x), _ROWS):
        code = context.sae.encode(x[start : start + _ROWS])
        row, latent, value = code.nonzero()
        step = step or math.ceil(len(value) * len(x) / len(code) / _ENTRIES)
        picked.append(code.columns(columns))
        rebuilt.append(context.sae.decode(code))
        pooled.index_add_(0, sequence[row + start] * d_sae + latent, value)
        double = value.double()
        sums.index_add_(1, latent, torch.stack([double, double.square(), torch.ones_like(double)]))
        inside = row % step == 0
        kept.append((row[inside] // step + sum(len(part) for part in some), latent[inside], value[inside]))
        some.append(torch.arange(start, start + len(code), step, device=x.device))
    mean = pooled.view(len(labels), d_sae) / _lengths(sequence, labels)[:, None]
    found = torch.cat(picked).unbind(1)
    entries = (torch.cat(part) for part in zip(*kept, strict=True))
    by_latent = dict(zip(columns.tolist(), found, strict=True))
    return LabelledCodes(x, sequence, labels, of_positions, by_latent, torch.cat(rebuilt), mean, sums, torch.cat(some), *entries)


def _lengths(sequence: Tensor, labels: Tensor) -> Tensor:
    return torch.bincount(sequence, minlength=len(labels)).clamp_min(1)


def _positions(source: Source, split: str, sequences: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions [n, d_in], the sequence of each [n], and the labels of the sequences [n_sequences, n_concepts] and of the
    positions [n, n_concepts]."""
    first = source.sequences(split, _BATCH, seed, 0)
    length = max(1, int(first.mask.sum()) // max(1, len(first)))
    wanted = max(1, min(sequences, tokens // length) // _BATCH)  # batches
    numbers = list(range(wanted))
    if split == "held_out":
        available = _batches(source, seed)
        numbers = [n * available // min(wanted, available) for n in range(min(wanted, available))]
    batches = [source.sequences(split, _BATCH, seed, number) for number in numbers]
    starts = [sum(len(batch) for batch in batches[:i]) for i in range(len(batches))]
    x = torch.cat([batch.x[batch.mask] for batch in batches])
    of = torch.cat([batch.mask.nonzero()[:, 0] + start for batch, start in zip(batches, starts, strict=True)])
    of_positions = torch.cat([batch.labels_of_positions() for batch in batches])
    return x, of, torch.cat([batch.labels for batch in batches]), of_positions


def _batches(source: Source, seed: int) -> int:
    """The number of batches of held-out sequences, found by requesting single sequences: at most about 40 are harvested."""
    low, high = 0, 1
    while len(source.sequences("held_out", 1, seed, high * _BATCH)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(source.sequences("held_out", 1, seed, middle * _BATCH)) else (low, middle)
    return low + 1
