"""Built-in sources: the text of the user's choice, and the bundled model organism on its own corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from saekit.activations.documents import TextUnit, find_files, held_out_documents, read_documents
from saekit.activations.harvest import HarvestSource, ModelDtype
from saekit.activations.packing import MixedRows, PackedRows, Rows, TokenStore, first_token, tokenise
from saekit.activations.sites import RESIDUAL
from saekit.activations.subject import Subject, load_subject, peek_model
from saekit.errors import UsageError

if TYPE_CHECKING:
    import torch

Kind = Literal["code", "prose", "facts", "sycophancy"]
ROWS_OF_KIND: dict[Kind, int] = {"code": 12, "prose": 10, "facts": 6, "sycophancy": 4}
"""Rows of each kind in every 32 that the organism was trained on. Facts are few: in training they come round often."""

HookPoint = Annotated[
    str, Field(description="Where to read: blocks.2.hook_out, a submodule's path, a TransformerLens name.")
]
RowsAForward = Annotated[int, Field(gt=0, description="Rows of tokens in one forward.")]
Bos = Annotated[
    bool | Literal["auto"], Field(description="Begin each row with BOS; auto: where the tokenizer has one.")
]
DropFirst = Annotated[bool, Field(description="Leave the first position of each row out (an attention sink).")]
DropSpecial = Annotated[bool, Field(description="Leave BOS, EOS and other special tokens out.")]
Dtype = Annotated[ModelDtype, Field(description="What the model computes in; bfloat16 on CUDA only.")]


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
        return {**peek_site(self.model, self.hook_point, self.context), "data": self.data}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> tuple[Subject, dict[str, Rows], dict[str, Any]]:
        """Load the model, then read and tokenise the data."""
        self.peek()  # a missing file is found before a model is loaded
        subject = load_subject(
            self.model, self.hook_point, device=device, dtype=dtype, trust_remote_code=self.trust_remote_code
        )
        documents = read_documents(
            self.data, column=self.column, split=self.split, subset=self.subset, unit=self.unit, limit=self.limit
        )
        store = tokenise(documents, subject.tokenizer)
        held_out = held_out_documents(store.hashes, self.held_out, f"data {self.data!r}")
        splits: dict[str, Rows] = {
            "train": packed(subject, store, ~held_out, self.context, self.bos),
            "held_out": packed(subject, store, held_out, self.context, self.bos),
        }
        identity = {"data": self.data, "data_digest": store.digest(), "held_out": self.held_out, "bos": self.bos}
        return subject, splits, identity


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


def peek_site(model: str, hook_point: str, context: int) -> dict[str, Any]:
    """What config.json tells of a model and a hook point. UsageError for a block or a context that it does not have."""
    known = peek_model(model)
    found: dict[str, Any] = {"model": model, "hook_point": hook_point}
    if context > known.get("context", context):
        raise UsageError(f"context = {context}: {model} takes {known['context']} tokens at most. Lower context.")
    residual = RESIDUAL.fullmatch(hook_point)
    if residual and int(residual[1]) >= known.get("layers", int(residual[1]) + 1):
        raise UsageError(
            f"hook_point = {hook_point!r}: {model} has {known['layers']} blocks, 0 to {known['layers'] - 1}."
        )
    if residual and "hidden_size" in known:
        found["d_in"] = found["d_out"] = known["hidden_size"]
    return found


def packed(
    subject: Subject, store: TokenStore, chosen: np.ndarray, context: int, bos: bool | Literal["auto"]
) -> PackedRows:
    """The rows of the documents that are `chosen` ([D] booleans), padded with a token that the model has."""
    tokenizer = subject.tokenizer
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    return PackedRows(store, np.flatnonzero(chosen), context=context, bos=first_token(tokenizer, bos), pad=pad)
