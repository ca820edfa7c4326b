"""`LatentSurvey`: how often and how strongly each latent fires, and where, from one pass over activations in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.activations.batch import Activations
from saekit.runner.context import RunContext
from saekit.sae.code import Code


@dataclass(frozen=True)
class Place:
    """One row at which a latent fires.

    row: its number in the pass. sequence, position: as in `Activations`; -1 if the source does not tell them.
    activation: of the latent there. around: its activation at each position up to `window` from there, by the difference of the
        positions; those that are not in the data are absent.
    """

    row: int
    sequence: int
    position: int
    activation: float
    around: dict[int, float]


class LatentSurvey:
    """Statistics and places of every latent, gathered batch by batch.

    d_sae: the number of latents.
    top: how many of its strongest places are kept for each latent, at most one in a sequence.
    sample: how many places are kept that are drawn evenly from all at which it fires. The draw is a hash of the row's number and
        the latent, so it is the same in every run and does not depend on the batches.
    window: how far around a place its activations are kept.

    Memory: `nbytes`, which depends on none of the data: 20 + (top + sample) * (32 + 4 * (2 * window + 1)) bytes a latent.
    16,384 latents with 8 + 8 places and a window of 12 take 35 MB, for a thousand activations as for a thousand million. While a
    batch is taken in, several times its code is needed on top.

    A sequence's rows must come one after the other; batches may cut it.
    """

    def __init__(self, d_sae: int, *, top: int = 8, sample: int = 0, window: int = 0, device: str | torch.device = "cpu") -> None:
        self.d_sae, self.window, self.rows = d_sae, window, 0
        self.fired = torch.zeros(d_sae, dtype=torch.long, device=device)
        """[d_sae], at how many rows each latent fired."""
        self.total = torch.zeros(d_sae, dtype=torch.float64, device=device)
        """[d_sae], the sum of its activations."""
        self.maximum = torch.zeros(d_sae, device=device)
        """[d_sae], its largest activation; 0 if it never fired."""
        self._top = _Kept(d_sae, top, window, device)
        self._sample = _Kept(d_sae, sample, window, device)

    @classmethod
    @torch.no_grad()
    def of(
        cls, context: RunContext, *, tokens: int | None = None, top: int = 8, sample: int = 0, window: int = 0
    ) -> LatentSurvey:
        """The survey of a run's SAE on its held-out activations. tokens: how many; `evaluation.tokens` by default."""
        survey = cls(context.sae.d_sae, top=top, sample=sample, window=window, device=context.device)
        batches = context.held_out_activations(tokens or context.config.evaluation.tokens)
        for batch in whole_sequences(batches):
            survey.update(batch, context.step(batch).code)
        return survey

    @torch.no_grad()
    def update(self, batch: Activations, code: Code) -> None:
        """Take in the rows of a batch, which holds its sequences whole (`whole_sequences` sees to that), and their code."""
        rows, latents, values = code.nonzero()  # [m] each, row after row
        values = values.float()
        fires = values > 0
        rows, latents, values = rows[fires], latents[fires], values[fires]
        self.fired += torch.bincount(latents, minlength=self.d_sae)
        self.total.index_add_(0, latents, values.double())
        self.maximum.scatter_reduce_(0, latents, values, "amax")
        seen = _Rows(batch, self.rows)
        entries = _Entries(rows, latents, values, self.d_sae)
        self.rows += len(batch)
        if self._top.k:
            self._top.take(_strongest_of_sequence(entries, seen.number), seen, entries)
        if self._sample.k:
            self._sample.take((entries.latents, _draw(entries, seen.row), entries.rows, entries.values), seen, entries)

    @property
    def density(self) -> Tensor:
        """[d_sae], at which share of the rows each latent fired."""
        return self.fired / max(1, self.rows)

    @property
    def mean(self) -> Tensor:
        """[d_sae], its mean activation where it fired; 0 if it never did."""
        return self.total / self.fired.clamp_min(1)

    @property
    def score(self) -> Tensor:
        """[d_sae], mean activation where it fired, over the square root of its density: strong and rare comes first."""
        return torch.where(self.fired > 0, self.mean / self.density.sqrt().clamp_min(1e-12), 0.0)

    @property
    def nbytes(self) -> int:
        """The bytes that are kept between batches."""
        kept = (*self._top.tensors(), *self._sample.tensors(), self.fired, self.total, self.maximum)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def top(self, latent: int) -> list[Place]:
        """Its strongest places, strongest first; of equal ones the earliest."""
        return self._top.places(latent)

    def quantiles(self, latent: int, n: int) -> list[tuple[float, Place]]:
        """`n` places spread evenly over the quantiles of its activations where it fires, highest first, with the quantile of each.

        Fewer if it fired less often. They are quantiles of the sample: with s places, to about half of 1 / sqrt(s)."""
        places = sorted(self._sample.places(latent), key=lambda place: (-place.activation, place.row))
        count = min(n, len(places))
        picked = [int((i + 0.5) * len(places) / count) for i in range(count)]
        return [(1 - (i + 0.5) / len(places), places[i]) for i in picked]


def whole_sequences(batches: Iterable[Activations]) -> Iterator[Activations]:
    """The same rows in the same order, in batches that cut no sequence: what is left of the last one waits for the next batch.

    Memory: a batch, and the longest sequence."""
    waiting: Activations | None = None
    for batch in batches:
        if batch.sequence is None:
            yield batch
            continue
        whole = batch if waiting is None else Activations.join([waiting, batch])
        others = (whole.sequence != batch.sequence[-1]).nonzero()  # type: ignore[union-attr]
        end = int(others[-1]) + 1 if len(others) else 0
        if end:
            yield whole.rows(slice(0, end))
        waiting = whole.rows(slice(end, len(whole)))
    if waiting is not None and len(waiting):
        yield waiting


# --- one batch -------------------------------------------------------------------------------------------------


class _Rows:
    """What is known of each row of a batch: its number in the pass, its sequence and position, and its sequence's number here."""

    def __init__(self, batch: Activations, before: int) -> None:
        place = torch.arange(len(batch), device=batch.x.device)
        self.row = before + place
        absent = torch.full_like(place, -1)
        self.sequence = absent if batch.sequence is None else batch.sequence.to(place.device)
        self.position = absent if batch.position is None else batch.position.to(place.device)
        if batch.sequence is None:
            self.number, self.at = place, torch.zeros_like(place)
            return
        begins = torch.ones_like(place, dtype=torch.bool)
        begins[1:] = self.sequence[1:] != self.sequence[:-1]
        self.number = begins.cumsum(0) - 1  # [n], 0, 1, ... for the sequences of this batch
        first = begins.nonzero()[:, 0][self.number]
        self.at = place - first if batch.position is None else self.position


@dataclass
class _Entries:
    """The activations of a batch that are positive: [m] each, sorted by row and then latent where they are looked up."""

    rows: Tensor
    latents: Tensor
    values: Tensor
    d_sae: int

    def __post_init__(self) -> None:
        key = self.rows * self.d_sae + self.latents
        self._keys, order = key.sort()
        self._values = self.values[order]

    def at(self, rows: Tensor, latents: Tensor) -> Tensor:
        """The activations of these latents at these rows, 0 where they are silent; the shape is that of the arguments."""
        wanted = rows * self.d_sae + latents
        if not len(self._keys):
            return torch.zeros_like(wanted, dtype=self.values.dtype)
        place = torch.searchsorted(self._keys, wanted).clamp_max(len(self._keys) - 1)
        return torch.where(self._keys[place] == wanted, self._values[place], 0.0)


Candidates = tuple[Tensor, Tensor, Tensor, Tensor]
"""latent, key to keep the largest of, row of the batch, activation: [c] each, rows rising among equals of a latent."""


def _strongest_of_sequence(entries: _Entries, number: Tensor) -> Candidates:
    """For each latent and each sequence of the batch the strongest place, the earliest of equal ones."""
    order = entries.values.argsort(descending=True, stable=True)
    group = number[entries.rows[order]] * entries.d_sae + entries.latents[order]
    group, within = group.sort(stable=True)
    first = torch.ones_like(group, dtype=torch.bool)
    first[1:] = group[1:] != group[:-1]
    chosen = order[within[first]].sort().values
    return entries.latents[chosen], entries.values[chosen], entries.rows[chosen], entries.values[chosen]


def _draw(entries: _Entries, row: Tensor) -> Tensor:
    """A number in (0, 1] for each entry, decided by the row's number and the latent (the finaliser of SplitMix64)."""
    mixed = row[entries.rows] * entries.d_sae + entries.latents + 1
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed = (mixed ^ (mixed >> 31)) & ((1 << 53) - 1)
    return (mixed.double() + 1) / (1 << 53)


# --- what is kept ----------------------------------------------------------------------------------------------


class _Kept:
    """For each latent the `k` places with the largest keys: [d_sae, k] each, unused ones with key -1."""

    def __init__(self, d_sae: int, k: int, window: int, device: str | torch.device) -> None:
        self.k, self.window = k, window
        self.key = torch.full((d_sae, k), -1.0, dtype=torch.float64, device=device)
        self.activation = torch.zeros(d_sae, k, device=device)
        self.row = torch.full((d_sae, k), -1, dtype=torch.long, device=device)
        self.sequence = torch.full_like(self.row, -1)
        self.position = torch.full_like(self.row, -1, dtype=torch.int32)
        self.around = torch.full((d_sae, k, 2 * window + 1), torch.nan, device=device)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.key, self.activation, self.row, self.sequence, self.position, self.around

    def take(self, candidates: Candidates, seen: _Rows, entries: _Entries) -> None:
        """Keep those of the candidates that are among the k largest; of equal keys those that came first."""
        latents, keys, rows, values = candidates
        keys = keys.double()
        better = keys > self.key[latents, -1]
        latents, keys, rows, values = latents[better], keys[better], rows[better], values[better]
        order = keys.argsort(descending=True, stable=True)
        order = order[latents[order].argsort(stable=True)]  # by latent, largest first
        latents, keys, rows, values = latents[order], keys[order], rows[order], values[order]
        touched, whose, count = latents.unique_consecutive(return_inverse=True, return_counts=True)  # [t], [c], [t]
        rank = torch.arange(len(latents), device=latents.device) - (count.cumsum(0) - count)[whose]
        few = rank < self.k  # the k best of each latent in this batch
        whose, rank, latents, keys, rows, values = (t[few] for t in (whose, rank, latents, keys, rows, values))

        fresh = {
            "key": keys,
            "activation": values,
            "row": seen.row[rows],
            "sequence": seen.sequence[rows],
            "position": seen.position[rows].int(),
            "around": self._around(latents, rows, seen, entries),
        }
        old_key = self.key[touched]  # [t, k]
        new_key = torch.full_like(old_key, -2.0)
        new_key[whose, rank] = keys
        kept = torch.cat([old_key, new_key], 1).argsort(dim=1, descending=True, stable=True)[:, : self.k]  # [t, k]
        for name, values_of in fresh.items():
            table = getattr(self, name)
            new = torch.zeros_like(table[touched])
            new[whose, rank] = values_of
            both = torch.cat([table[touched], new], 1)  # [t, 2k, ...]
            index = kept if both.ndim == 2 else kept[:, :, None].expand(-1, -1, both.shape[2])
            table[touched] = both.gather(1, index)

    def _around(self, latents: Tensor, rows: Tensor, seen: _Rows, entries: _Entries) -> Tensor:
        """[c, 2 * window + 1], the latent's activation at each position around; NaN where the data has none."""
        width, found = 2 * self.window + 1, entries.values.new_full((len(rows), 2 * self.window + 1), torch.nan)
        near = rows[:, None] + torch.arange(-self.window, self.window + 1, device=rows.device)  # [c, width]
        inside = (near >= 0) & (near < len(seen.row))
        near = near.clamp(0, len(seen.row) - 1)
        apart = seen.at[near] - seen.at[rows][:, None] + self.window  # where in the window
        inside &= (seen.number[near] == seen.number[rows][:, None]) & (apart >= 0) & (apart < width)
        which = inside.nonzero()[:, 0]
        found[which, apart[inside]] = entries.at(near[inside], latents[which])
        return found

    def places(self, latent: int) -> list[Place]:
        """Those of one latent, in the order of their keys."""
        used = int((self.key[latent] >= 0).sum())
        columns = (self.row, self.sequence, self.position, self.activation, self.around)
        rows = zip(*(column[latent, :used].tolist() for column in columns), strict=True)
        return [
            Place(row, sequence, position, activation, {i - self.window: v for i, v in enumerate(around) if v == v})
            for row, sequence, position, activation, around in rows
        ]
