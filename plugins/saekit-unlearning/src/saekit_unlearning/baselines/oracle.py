"""The oracle: a model that never learned what is to be forgotten, the bound of every method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from saekit import load_subject
from saekit_unlearning.baselines.material import Material
from saekit_unlearning.edited import Edited
from saekit_unlearning.passages import Site


@dataclass(frozen=True)
class Oracle:
    """model: its directory or hub name. It must have the tokenizer and the hook point of the subject."""

    model: str
    name: str = "the oracle"

    def settings(self, material: Material, seed: int) -> Iterator[Edited]:
        """The one that there is; the seed makes no difference."""
        subject = material.site.subject
        dtype = next(subject.model.parameters()).dtype
        never = load_subject(self.model, subject.site.name, device=str(subject.device), dtype=dtype)
        yield Edited("never learned it", Site(never, material.site.trained), changed=True)
