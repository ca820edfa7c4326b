"""The methods that select latents afterwards and edit them: by sparsity, by attribution, greedily."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from saekit_unlearning.edits import Path
from saekit_unlearning.interventions import operations
from saekit_unlearning.methods import Prepared, Seen
from saekit_unlearning.selection import by_attribution, by_sparsity, greedily

Rankings = Callable[[Seen], Mapping[str, list[int]]]
"""From what is seen to rankings of latents, each with what sets it apart in words."""


@dataclass(frozen=True)
class Grid:
    """What is tried with every ranking: how many latents, which operations, which paths."""

    numbers: Sequence[int]
    ablate: bool
    clamps: Sequence[float]
    rms_clamps: Sequence[float]
    paths: Sequence[Path]


@dataclass(frozen=True)
class EditedLatents:
    """The first latents of rankings, edited in every way of a grid."""

    name: str
    rankings: Rankings
    grid: Grid

    def prepare(self, seen: Seen) -> Prepared:
        """Its candidates are those of its longest ranking."""
        rankings, trials = self.rankings(seen), []
        rms = (seen.on_forget + seen.on_retain).rms
        how = operations(ablate=self.grid.ablate, clamps=self.grid.clamps, rms_clamps=self.grid.rms_clamps, rms=rms)
        for of, ranking in rankings.items():
            for number in sorted({min(number, len(ranking)) for number in self.grid.numbers} - {0}):
                for name, operation in how.items():
                    label = f"{number} latents{f', {of}' if of else ''}, {name}"
                    trials += [seen.trial(label, ranking[:number], operation, path) for path in self.grid.paths]
        return Prepared(max(map(len, rankings.values()), default=0), trials, self.grid.paths)


def sparsity(thresholds: Sequence[float], grid: Grid) -> EditedLatents:
    """SAEBench's rule at each of several thresholds. Retain text is the texts that are shown, and other text; a latent's rate is
    the higher of the two."""

    def rankings(seen: Seen) -> dict[str, list[int]]:
        forget, retain = seen.on_forget.rate, torch.maximum(seen.on_retain.rate, seen.on_general.rate)
        return {f"active on less than {t:g} of retain text": by_sparsity(forget, retain, t) for t in thresholds}

    return EditedLatents("sparsity", rankings, grid)


def attribution(grid: Grid) -> EditedLatents:
    """By activation times gradient."""
    return EditedLatents("attribution", lambda seen: {"": by_attribution(seen)}, grid)


def greedy(grid: Grid) -> EditedLatents:
    """By attribution that is computed again with the latents ablated that were chosen already."""
    return EditedLatents("greedy", lambda seen: {"": greedily(seen, grid.numbers)}, grid)
