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


@dataclass(frozen=True)
class Part:
    """Documents of one kind with their labels: all, or those of some domains of the facts. rows: of every 32."""

    kind: Kind
    rows: int
    labels: dict[str, float]
    domains: tuple[str, ...] | None = None

    def chosen(self, store: TokenStore, split: str) -> np.ndarray:
        """Which documents of the kind's they are: [D] booleans."""
        if self.domains is None:
            return np.ones(len(store), dtype=bool)
        from saekit import organism

        return np.asarray([d.id.split("/")[1] in self.domains for d in organism.documents(split, [self.kind])])


def parts_of(kind: Kind, labels: list[str]) -> list[Part]:
    """What a kind consists of: one part, or two for facts if they are labelled `forget`."""
    rows, code = ROWS_OF_KIND[kind], {"code": LABELS[kind]} if kind in LABELS else {}
    if "forget" not in labels:
        return [Part(kind, rows, code)]
    if kind != "facts":
        return [Part(kind, rows, {**code, "forget": 0.0})]
    # A third each of the facts is of the domains forget, near and far.
    return [Part(kind, rows // 3, {"forget": 1.0}, ("forget",)), Part(kind, rows - rows // 3, {"forget": 0.0}, ("near", "far"))]


@dataclass(kw_only=True, eq=False, repr=False)
class OrganismSource(LabelledHarvestSource):
    """Activations of the bundled model organism on its own corpus, mixed as in its training.

    The label `code` is 1 in rows of code, 0 in rows of prose, and unknown in the others. The label `forget`, which `labels` may ask
    for, is 1 in rows of facts about what is to be forgotten, which then stand in rows of their own, and 0 in all others. Its
    labelled sequences are the rows with a known label.
    """

    hook_point: HookPoint = "blocks.2.hook_out"
    variant: Annotated[
        Literal["base", "oracle"],
        Field(description="base, or oracle: trained without the facts of the domain forget."),
    ] = "base"
    kinds: Annotated[list[Kind], Field(min_length=1, description="Which kinds of document.")] = field(
        default_factory=lambda: list(ROWS_OF_KIND)
    )
    labels: Annotated[list[Literal["code", "forget"]], Field(min_length=1, description="Which labels are given.")] = field(
        default_factory=lambda: ["code"]
    )
    context: Annotated[int, Field(gt=1, description="Tokens in a row; the organism takes 128 at most.")] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kinds = list(dict.fromkeys(self.kinds))
        self.labels = list(dict.fromkeys(self.labels))
        self.concepts = list(self.labels)
        fix = 'Put both "code" and "prose" in source.kinds.' if not LABELS.keys() <= set(self.kinds) else ""
        if "code" not in self.labels:
            fix = 'Put "facts" and another kind in source.kinds.' if "facts" not in self.kinds or len(self.kinds) < 2 else ""
        if fix:
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
            parts = [part for kind in self.kinds for part in parts_of(kind, self.concepts)]
            splits[split] = self._mixed(subject, stores, parts, split)
            labelled = [part for part in parts if part.labels]
            if labelled:
                self.labelled[split] = self._mixed(subject, stores, labelled, split)
        identity = {"data": "organism", "kinds": self.kinds, "data_digest": digests}
        return subject, splits, identity if self.labels == ["code"] else {**identity, "labels": self.labels}

    def fingerprint(self) -> dict[str, Any] | None:
        """What determines the activations, without loading; see `protocols.Source.fingerprint`.

        The corpus follows from the code that gathers it and from the version of Python."""
        from saekit import organism

        code = Path(organism.__file__).parent
        files = sorted([*code.glob("*.py"), *code.glob("*.txt")])
        found = self._fingerprint(files, "variant", "kinds", "labels")
        return None if found is None else {**found, "python": platform.python_version()}

    def _mixed(self, subject: Subject, stores: dict[Kind, TokenStore], parts: list[Part], split: str) -> MixedRows:
        rows = [packed(subject, stores[p.kind], p.chosen(stores[p.kind], split), self.context, "auto") for p in parts]
        given = np.asarray([[p.labels.get(name, np.nan) for name in self.concepts] for p in parts], dtype=np.float32)
        return MixedRows(rows, [part.rows for part in parts], given=given)  # given: [parts, labels]
