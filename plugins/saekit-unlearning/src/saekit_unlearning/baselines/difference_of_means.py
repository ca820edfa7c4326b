"""Difference of means (Belrose 2023): a direction at the site, subtracted or projected out, without any training.

With v = mean of activations at names to forget - mean at names that are to stay (the last token of each), and
t(x) = (x - mean at names that are to stay) . v / |v|^2, which is 0 at that mean on average and 1 at the other:

    subtracted:     x - strength * v
    projected out:  x - strength * t(x) * v

everywhere, or only where t(x) > 1/2, so that x lies nearer to what is to be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saekit_unlearning.baselines.material import Material, Row, Rows
from saekit_unlearning.baselines.options import Positives
from saekit_unlearning.edited import Edited
from saekit_unlearning.passages import Passages, Site


@dataclass(frozen=True)
class Shift:
    """The edit at the site: origin and direction are [d]."""

    origin: Tensor
    direction: Tensor
    strength: float
    projected: bool
    everywhere: bool

    def __call__(self, passages: Passages) -> Tensor:
        x = passages.x
        v, origin = self.direction.to(x), self.origin.to(x)
        t = ((x - origin) @ v / v.square().sum())[:, None]  # [m, 1]
        by = t if self.projected else torch.ones_like(t)
        if not self.everywhere:
            by = by.where(t > 0.5, 0.0)
        return passages.with_x(x - self.strength * by * v)


@dataclass(frozen=True)
class DifferenceOfMeans:
    """Every strength, subtracted and projected out, everywhere and where the direction is present, is a setting."""

    strengths: Positives = (1.0, 2.0, 4.0, 8.0)
    name: ClassVar[str] = "difference_of_means"

    def settings(self, material: Material, seed: int) -> Iterator[Edited]:
        """The subject's own model with each edit at the site; the seed makes no difference."""
        site = material.site
        origin = mean_at_names(site, material.retain)
        direction = mean_at_names(site, material.forget) - origin
        for projected in (False, True):
            for everywhere in (False, True):
                for strength in self.strengths:
                    how, where = (
                        "projected out" if projected else "subtracted",
                        "everywhere" if everywhere else "where present",
                    )
                    edit = Shift(origin, direction, strength, projected, everywhere)
                    yield Edited(f"{how} {where}, strength {strength:g}", site, edit=edit)


@torch.no_grad()
def mean_at_names(site: Site, rows: Sequence[Row]) -> Tensor:
    """The mean activation at the last token of names: [d]."""
    found = []
    for start in range(0, len(rows), 64):
        some = Rows.of(rows[start : start + 64], site.subject.device)
        with site.subject.lock:
            recorded = site.replay.record(some.tokens, some.mask).activation  # [n, T, d]
        found.append(recorded[torch.arange(len(recorded)), some.names])
    return torch.cat(found).mean(0)
