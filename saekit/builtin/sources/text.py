"""The source `text`: any language model on the text of the user's choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from saekit.activations.documents import TextUnit, find_files, held_out_documents, read_documents
from saekit.activations.harvest import HarvestSource
from saekit.activations.huggingface import load_subject
from saekit.activations.packing import Rows, tokenise
from saekit.activations.subject import Subject
from saekit.builtin.sources.common import (
    Bos,
    DropFirst,
    DropSpecial,
    Dtype,
    HookPoint,
    RowsAForward,
    TargetHookPoint,
    fingerprint,
    packed,
    peek_site,
)

if TYPE_CHECKING:
    import torch


class TextSource(HarvestSource):
    """Activations of a Hugging Face language model on text files or a data set."""

    def __init__(
        self,
        *,
        model: Annotated[str, Field(description="A local directory or a name on the Hugging Face hub.")],
        hook_point: HookPoint,
        data: Annotated[
            str, Field(description="A .txt, .jsonl or .parquet file, a directory or glob of them, or a data set.")
        ],
        target_hook_point: TargetHookPoint = None,
        column: Annotated[str, Field(description="The key or column that holds the text.")] = "text",
        split: Annotated[str, Field(description="Which split of a data set to read.")] = "train",
        subset: Annotated[str | None, Field(description="Which configuration of a data set to read.")] = None,
        unit: Annotated[
            TextUnit,
            Field(description="One document of a .txt: file, paragraph, line; auto: file if there are several files."),
        ] = "auto",
        limit: Annotated[int | None, Field(gt=1, description="Read so many documents at most.")] = None,
        held_out: Annotated[float, Field(gt=0, lt=1, description="The share of documents that is held out.")] = 0.05,
        context: Annotated[int, Field(gt=1, description="Tokens in a row.")] = 128,
        bos: Bos = "auto",
        drop_first: DropFirst = True,
        drop_special: DropSpecial = False,
        rows: RowsAForward = 32,
        model_dtype: Dtype = "float32",
        trust_remote_code: Annotated[bool, Field(description="Run code that comes with the model.")] = False,
    ):
        super().__init__(
            hook_point=hook_point,
            target_hook_point=target_hook_point,
            context=context,
            rows=rows,
            drop_first=drop_first,
            drop_special=drop_special,
            model_dtype=model_dtype,
        )
        self.model = model
        self.data = data
        self.column = column
        self.split = split
        self.subset = subset
        self.unit: TextUnit = unit
        self.limit = limit
        self.held_out = held_out
        self.bos = bos
        self.trust_remote_code = trust_remote_code

    def peek(self) -> dict[str, Any]:
        """Model and data by name, and the width for a residual hook point; see `contracts.Source.peek`."""
        find_files(self.data)
        return {**peek_site(self.model, self.hook_point, self.target_hook_point, self.context), "data": self.data}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> tuple[Subject, dict[str, Rows], dict[str, Any]]:
        """Load the model, then read and tokenise the data."""
        self.peek()  # a missing file is found before a model is loaded
        subject = load_subject(
            self.model,
            self.hook_point,
            target_hook_point=self.target_hook_point,
            device=device,
            dtype=dtype,
            trust_remote_code=self.trust_remote_code,
        )
        documents = read_documents(
            self.data, column=self.column, split=self.split, subset=self.subset, unit=self.unit, limit=self.limit
        )
        store = tokenise(documents, subject.tokenizer)
        held_out = held_out_documents(store.hashes, self.held_out, self.data)
        splits: dict[str, Rows] = {
            "train": packed(subject, store, ~held_out, self.context, self.bos),
            "held_out": packed(subject, store, held_out, self.context, self.bos),
        }
        identity = {"data": self.data, "data_digest": store.digest(), "held_out": self.held_out, "bos": self.bos}
        return subject, splits, identity

    def fingerprint(self) -> dict[str, Any] | None:
        """What determines the activations, without loading; see `contracts.Source.fingerprint`."""
        options = ("column", "split", "subset", "unit", "limit", "held_out", "bos")
        return fingerprint(self, self.model, find_files(self.data), options)
