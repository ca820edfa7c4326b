"""The source `organism`: the bundled model organism on its own corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from saekit.activations.harvest import HarvestSource
from saekit.activations.packing import MixedRows, Rows, tokenise
from saekit.activations.subject import Subject, load_subject
from saekit.builtin.sources.common import DropFirst, DropSpecial, Dtype, HookPoint, RowsAForward, packed, peek_site
from saekit.errors import UsageError

if TYPE_CHECKING:
    import torch

Kind = Literal["code", "prose", "facts", "sycophancy"]
ROWS_OF_KIND: dict[Kind, int] = {"code": 12, "prose": 10, "facts": 6, "sycophancy": 4}
"""Rows of each kind in every 32 that the organism was trained on. Facts are few: in training they come round often."""


class OrganismSource(HarvestSource):
    """Activations of the bundled model organism on its own corpus, mixed as in its training."""

    def __init__(
        self,
        *,
        hook_point: HookPoint = "blocks.2.hook_out",
        variant: Annotated[
            Literal["base", "oracle"],
            Field(description="base, or oracle: trained without the facts of the domain forget."),
        ] = "base",
        kinds: Annotated[list[Kind], Field(min_length=1, description="Which kinds of document.")] = [  # noqa: B006
            "code",
            "prose",
            "facts",
            "sycophancy",
        ],
        context: Annotated[int, Field(gt=1, description="Tokens in a row; the organism takes 128 at most.")] = 128,
        drop_first: DropFirst = True,
        drop_special: DropSpecial = False,
        rows: RowsAForward = 32,
        model_dtype: Dtype = "float32",
    ):
        super().__init__(
            hook_point=hook_point,
            context=context,
            rows=rows,
            drop_first=drop_first,
            drop_special=drop_special,
            model_dtype=model_dtype,
        )
        self.variant = variant
        self.kinds = list(dict.fromkeys(kinds))

    def peek(self) -> dict[str, Any]:
        """Model and data by name, and the width for a residual hook point; see `contracts.Source.peek`."""
        found = peek_site(self._directory(), self.hook_point, self.context)
        return {**found, "model": f"organism ({self.variant})", "data": f"organism: {', '.join(self.kinds)}"}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> tuple[Subject, dict[str, Rows], dict[str, Any]]:
        """Load the organism, then gather and tokenise its corpus."""
        from saekit import organism

        subject = load_subject(self._directory(), self.hook_point, device=device, dtype=dtype)
        splits: dict[str, Rows] = {}
        digests: dict[str, str] = {}
        for split in ("train", "held_out"):
            parts = []
            for kind in self.kinds:
                store = tokenise(organism.documents(split, [kind]), subject.tokenizer)
                parts.append(packed(subject, store, np.ones(len(store), dtype=bool), self.context, "auto"))
                digests[f"{split}/{kind}"] = store.digest()
            splits[split] = MixedRows(parts, [ROWS_OF_KIND[kind] for kind in self.kinds])
        return subject, splits, {"data": "organism", "kinds": self.kinds, "data_digest": digests}

    def _directory(self) -> str:
        from saekit import organism

        try:
            return str(organism.directory(self.variant))
        except FileNotFoundError as error:
            raise UsageError(str(error)) from None
