"""The pass over held-out batches: the outputs as they are, with the SAE spliced in, and with each latent edited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.activations.batch import RunBatch
from saekit.builtin.intervene.choice import Chosen
from saekit.builtin.intervene.means import ClusteredMeans
from saekit.interventions.edits import EditTable, change_of
from saekit.numerics import own_numerics
from saekit.sae.base import SparseAutoencoder

KEPT, SPLICED = "error kept", "spliced"
ALL, WITH, WITHOUT = "all", "with", "without"
GROUPS = (ALL, WITH, WITHOUT)


@dataclass
class Edited:
    """What one latent's edit does in one mode, on the rows of a chosen latent's concept.

    change: of each output, and of the mean of the targets in the last column.
    """

    mode: str
    chosen: Chosen
    latent: int
    change: ClusteredMeans

    @property
    def is_control(self) -> bool:
        """Whether it is a matched random latent's."""
        return self.latent != self.chosen.latent


class Measured:
    """Everything that one pass finds.

    names: of the outputs. before: for each mode and chosen latent the outputs without an edit; in the mode `SPLICED` those with the
    reconstruction in place of the activation. splice: what the splice alone changes, for each chosen latent.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        chosen: Sequence[Chosen],
        tables: dict[int, EditTable],
        *,
        modes: Sequence[str],
        concepts: Sequence[str],
        outputs: Sequence[str] | None,
        targets: dict[str, list[str]],
        scale: Callable[[Tensor], Tensor],
    ) -> None:
        self._sae, self.chosen, self._tables, self._modes = sae, chosen, tables, modes
        self._concepts, self._wanted, self._targets, self._scale = concepts, outputs, targets, scale
        self.names: list[str] = []
        self.before: dict[tuple[str, int], ClusteredMeans] = {}
        self.splice: dict[int, ClusteredMeans] = {}
        self.edited: list[Edited] = []
        self.sequences = self.batches = 0

    @torch.no_grad()
    def measure(self, batches: Iterable[RunBatch], most: int) -> None:
        """Take in batches until they hold `most` sequences; one batch at least."""
        with own_numerics(self._sae, self._sae.W_dec.device):
            for batch in batches:
                self._take(batch)
                self.batches += 1
                self.sequences += len(batch.sequence.unique())
                if self.sequences >= most:
                    return

    def targets(self, one: Chosen) -> list[int]:
        """The columns of the outputs that the latent's concept should move; none if they are not known."""
        wanted = self._targets.get(one.concept or "", [])
        return [self.names.index(name) for name in wanted]

    def _take(self, batch: RunBatch) -> None:
        columns = self._columns(batch.names)
        member = [self._member(batch, one) for one in self.chosen]
        code = self._sae.encode(batch.x.to(self._sae.W_dec.dtype))
        plain = self._values(batch.outputs, columns)
        for mode in self._modes:
            error: Tensor | float = 0.0 if mode == KEPT else self._sae.decode(code) - batch.x
            start = plain if mode == KEPT else self._values(batch.run(error), columns)  # type: ignore[arg-type]
            for number, one in enumerate(self.chosen):
                place = mode, number
                self._sums(self.before, place).update(self._with_target(start, one), member[number], batch.sequence)
                if mode == SPLICED:
                    moved = self._with_target(start - plain, one)
                    self._sums(self.splice, number).update(moved, member[number], batch.sequence)
            for latent, table in self._tables.items():
                after = self._values(batch.run(change_of(self._sae, code, table) + error), columns) - start
                for edited in self._of(mode, latent):
                    number = next(n for n, one in enumerate(self.chosen) if one is edited.chosen)
                    edited.change.update(self._with_target(after, edited.chosen), member[number], batch.sequence)

    def _columns(self, names: Sequence[str]) -> list[int]:
        """Which outputs are measured. Sets everything up at the first batch."""
        wanted = list(names if self._wanted is None else self._wanted)
        columns = {name: column for column, name in enumerate(names)}
        if not self.names:
            self.names = wanted
            self.edited = [
                Edited(mode, one, latent, self._new())
                for mode in self._modes
                for one in self.chosen
                for latent in [one.latent, *one.controls]
            ]
        return [columns[name] for name in wanted]

    def _of(self, mode: str, latent: int) -> list[Edited]:
        return [edited for edited in self.edited if edited.mode == mode and edited.latent == latent]

    def _new(self) -> ClusteredMeans:
        return ClusteredMeans(len(GROUPS), len(self.names) + 1, self._sae.W_dec.device)

    def _sums(self, kept: dict, place: object) -> ClusteredMeans:
        return kept[place] if place in kept else kept.setdefault(place, self._new())

    def _values(self, outputs: Tensor, columns: list[int]) -> Tensor:
        """The outputs that are measured, on the scale that was asked for: [k, columns]."""
        return self._scale(outputs.double())[:, columns]

    def _with_target(self, values: Tensor, one: Chosen) -> Tensor:
        """With the mean of the concept's own outputs as a last column, 0 if there are none."""
        own = self.targets(one)
        mean = values[:, own].mean(1, keepdim=True) if own else values.new_zeros(len(values), 1)
        return torch.cat([values, mean], 1)

    def _member(self, batch: RunBatch, one: Chosen) -> Tensor:
        """Which rows of the outputs are in each of `GROUPS`: [3, k]."""
        every = torch.ones_like(batch.sequence, dtype=torch.bool)
        if one.concept is None or batch.labels is None:
            return torch.stack([every, ~every, ~every])
        label = batch.labels[:, self._concepts.index(one.concept)]
        return torch.stack([every, label == 1, label == 0])
