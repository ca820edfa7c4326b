"""What a method without an SAE is, and how it becomes one of the analyzer's methods."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from saekit_unlearning.baselines.material import Material
from saekit_unlearning.edited import Edited
from saekit_unlearning.methods import Prepared, Seen, Trial


class Baseline(Protocol):
    """A method without an SAE."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    def settings(self, material: Material, seed: int) -> Iterator[Edited]:
        """The model that each of its settings leaves."""
        ...


class AsMethod:
    """The `Method` of methods.py that tries a baseline's settings. It keeps the models of all of them."""

    def __init__(self, baseline: Baseline) -> None:
        self.baseline, self.name = baseline, baseline.name

    def prepare(self, seen: Seen) -> Prepared:
        """Train them on what is seen; there are no latents to edit."""
        material = Material.of(seen.site, seen.forget, seen.retain, seen.general)
        found = self.baseline.settings(material, seen.seed)
        return Prepared(None, [Trial(edited.label, None, edited.logits, edited=edited) for edited in found])
