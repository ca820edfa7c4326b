"""The source `text`: any language model on any text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from saekit.activations.documents import TextUnit, find_files, read_documents
from saekit.activations.packing import Rows
from saekit.activations.subject import Subject
from saekit.builtin.sources.common import TextsSource, packed

if TYPE_CHECKING:
    import torch


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
        """Model and data by name, and the width for a residual hook point; see `protocols.Source.peek`."""
        find_files(self.data)
        return {**super().peek(), "data": self.data}

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
