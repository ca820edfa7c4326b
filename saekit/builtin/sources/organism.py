"""The source `organism`: the bundled model organism on its own corpus."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from saekit.activations.harvest import HookPoint, LabelledHarvestSource
from saekit.activations.packing import MixedRows, Rows, TokenStore
from saekit.activations.subject import Subject
from saekit.builtin.sources.common import packed
from saekit.errors import UsageError

if TYPE_CHECKING:
    import torch

Kind = Literal["code", "prose", "facts", "sycophancy"]
ROWS_OF_KIND: dict[Kind, int] = {"code": 12, "prose": 10, "facts": 6, "sycophancy": 4}
"""Rows of each kind in every 32 that the organism was trained on. Facts are few, so in training they are repeated often."""
LABELS: dict[Kind, float] = {"code": 1.0, "prose": 0.0}
"""The label `code` of the kinds that have one."""


@dataclass(kw_only=True, eq=False, repr=False)
class OrganismSource(LabelledHarvestSource):
    """Activations of the bundled model organism on its own corpus, mixed as in its training.

    The label `code` is 1 in rows of code, 0 in rows of prose, and unknown in the others. Its labelled sequences are the
    rows of code and of prose.
    """

    hook_point: HookPoint = "blocks.2.hook_out"
    variant: Annotated[
        Literal["base", "oracle"],
        Field(description="base, or oracle: trained without the facts of the domain forget."),
    ] = "base"
    kinds: Annotated[list[Kind], Field(min_length=1, description="Which kinds of document.")] = field(
        default_factory=lambda: list(ROWS_OF_KIND)
    )
    context: Annotated[int, Field(gt=1, description="Tokens in a row; the organism takes 128 at most.")] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kinds = list(dict.fromkeys(self.kinds))
        self.concepts = ["code"]
        if not LABELS.keys() <= set(self.kinds):
            fix = 'Put both "code" and "prose" in source.kinds.'
            self.withheld |= dict.fromkeys(("labels", "sequences"), fix)

    @property
    def model(self) -> str:
        """The directory of the bundled model."""
        from saekit import organism

        try:
            return str(organism.directory(self.variant))
        except FileNotFoundError as error:
            raise UsageError(str(error)) from None

    def peek(self) -> dict[str, Any]:
        """Model and data by name, and the width for a residual hook point; see `protocols.Source.peek`."""
        data = f"organism: {', '.join(self.kinds)}"
        return {**super().peek(), "model": f"organism ({self.variant})", "data": data}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> tuple[Subject, dict[str, Rows], dict[str, Any]]:
        """Load the organism, and its corpus as tokens."""
        from saekit.organism.tokens import SPLITS, corpus_tokens

        subject = self.load(device, dtype)
        splits: dict[str, Rows] = {}
        digests: dict[str, str] = {}
        self.labelled = {}
        tokens = {kind: corpus_tokens(kind, subject.tokenizer) for kind in self.kinds}
        for split in SPLITS:
            stores = {kind: tokens[kind][split] for kind in self.kinds}
            digests |= {f"{split}/{kind}": store.digest() for kind, store in stores.items()}
            splits[split] = self._mixed(subject, stores, self.kinds)
            labelled = [kind for kind in self.kinds if kind in LABELS]
            if labelled:
                self.labelled[split] = self._mixed(subject, stores, labelled)
        return subject, splits, {"data": "organism", "kinds": self.kinds, "data_digest": digests}

    def fingerprint(self) -> dict[str, Any] | None:
        """What determines the activations, without loading; see `protocols.Source.fingerprint`.

        The corpus follows from the code that gathers it and from the version of Python."""
        from saekit import organism

        code = Path(organism.__file__).parent
        files = sorted([*code.glob("*.py"), *code.glob("*.txt")])
        found = self._fingerprint(files, "variant", "kinds")
        return None if found is None else {**found, "python": platform.python_version()}

    def _mixed(self, subject: Subject, stores: dict[Kind, TokenStore], kinds: list[Kind]) -> MixedRows:
        parts = [
            packed(subject, stores[kind], np.ones(len(stores[kind]), dtype=bool), self.context, "auto")
            for kind in kinds
        ]
        given = np.asarray([[LABELS.get(kind, np.nan)] for kind in kinds], dtype=np.float32)  # [kinds, 1]
        return MixedRows(parts, [ROWS_OF_KIND[kind] for kind in kinds], given=given)
