"""The oracle: a model that never learned what is to be forgotten, the bound of every method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from saekit import UsageError, load_subject
from saekit_unlearning.baselines.material import Material
from saekit_unlearning.edited import Edited
from saekit_unlearning.passages import Site


@dataclass(frozen=True)
class Oracle:
    """model: its directory or hub name. It must have the tokenizer and the hook point of the subject."""

    model: str
    name: ClassVar[str] = "oracle"

    def settings(self, material: Material, seed: int) -> Iterator[Edited]:
        """The one that there is; the seed makes no difference."""
        yield self.at(material.site)

    def at(self, site: Site) -> Edited:
        """It, at the hook point of a site. UsageError if it has other tokens."""
        subject = site.subject
        dtype = next(subject.model.parameters()).dtype
        never = load_subject(self.model, subject.site.name, device=str(subject.device), dtype=dtype)
        texts = ("In May Ann moved to Rome.", "for (i = 0; i < 10; ++i) {")
        ids, own = ([of.tokenizer(text, verbose=False)["input_ids"] for text in texts] for of in (never, subject))
        if ids != own:
            raise UsageError(
                f"the oracle {self.model!r} divides text into other tokens than {subject.name!r}, so their answers cannot be "
                "compared. Give a model with the same tokenizer, or leave the oracle out."
            )
        return Edited("never learned it", Site(never, site.trained), changed=True)
