"""The source `text`: any language model on any text."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from saekit.activations.documents import TextUnit, find_files, held_out_documents, read_documents, text_hash
from saekit.activations.packing import Rows
from saekit.activations.subject import Subject
from saekit.builtin.sources.common import TextsSource, packed

if TYPE_CHECKING:
    import torch

LOOKED_AT, LOOKED_AT_BYTES = 1000, 2**26
"""How many documents are looked at when a run is planned, and the most bytes that are read for it."""
SHORT = 32
"""A document of fewer characters is about a phrase."""


@dataclass(kw_only=True, eq=False, repr=False)
class TextSource(TextsSource):
    """Activations of a Hugging Face language model on text files or a data set."""

    data: Annotated[
        str, Field(description="A .txt, .jsonl or .parquet file, a directory or glob of them, or a data set.")
    ]
    split: Annotated[str, Field(description="Which split of a data set to read.")] = "train"
    subset: Annotated[str | None, Field(description="Which configuration of a data set to read.")] = None
    unit: Annotated[
        TextUnit,
        Field(description="One document of a .txt: file, paragraph, line; auto: file if there are several files."),
    ] = "auto"
    limit: Annotated[int | None, Field(gt=1, description="The most documents to read.")] = None
    held_out: Annotated[float, Field(gt=0, lt=1, description="The share of documents that is held out.")] = 0.05

    def peek(self) -> dict[str, Any]:
        """Model and data by name, and the width for a residual hook point; see `protocols.Source.peek`.

        Of small text files it looks at how they fall into documents: OptionError if there are too few to hold any out."""
        files = find_files(self.data)
        self.warnings = self._looked_at(files) if files and all(path.suffix == ".txt" for path in files) else []
        return {**super().peek(), "data": self.data}

    def _looked_at(self, files: list[Path]) -> list[str]:
        """What there is to say of the first documents of .txt files; nothing if it would take long to read them."""
        if sum(path.stat().st_size for path in files[:LOOKED_AT]) > LOOKED_AT_BYTES:
            return []
        documents = read_documents(self.data, unit=self.unit, limit=self.limit)
        texts = [document.text for document in itertools.islice(documents, LOOKED_AT)]
        if len(texts) < LOOKED_AT:  # these are all
            held_out_documents(np.asarray([text_hash(text) for text in texts], dtype=np.uint64), self.held_out, self.data)
        middle = int(statistics.median(len(text.strip()) for text in texts))
        if middle >= SHORT:
            return []
        return [
            f"{self.data}: half of the first {len(texts):,} documents have at most {middle} characters. Rows of {self.context} "
            f'tokens join many of them. If they belong together, set source.unit to "paragraph" or "file".'
        ]

    def prepare(self, device: torch.device, dtype: torch.dtype) -> tuple[Subject, dict[str, Rows], dict[str, Any]]:
        """Load the model, then read and tokenise the data."""
        self.peek()  # a missing file is found before a model is loaded
        subject = self.load(device, dtype)
        documents = read_documents(
            self.data, column=self.column, split=self.split, subset=self.subset, unit=self.unit, limit=self.limit
        )
        store, held_out = self.divided(documents, subject, eos=True)
        splits: dict[str, Rows] = {
            "train": packed(subject, store, ~held_out, self.context, self.bos),
            "held_out": packed(subject, store, held_out, self.context, self.bos),
        }
        return subject, splits, self.data_identity(store)

    def fingerprint(self) -> dict[str, Any] | None:
        """What determines the activations, without loading; see `protocols.Source.fingerprint`."""
        options = ("column", "split", "subset", "unit", "limit", "held_out", "bos")
        return self._fingerprint(find_files(self.data), *options)
