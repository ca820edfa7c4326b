"""What the sources `text` and `labelled` share: their options, and how texts are divided and packed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from saekit.activations.documents import Document, held_out_documents
from saekit.activations.harvest import HarvestSource
from saekit.activations.packing import PackedRows, TokenStore, first_token, tokenise
from saekit.activations.subject import Subject

Bos = bool | Literal["auto"]


@dataclass(kw_only=True, eq=False, repr=False)
class TextsSource(HarvestSource):
    """A language model on texts, of which a share is held out."""

    model: Annotated[str, Field(description="A local directory or a name on the Hugging Face hub.")]
    data: Annotated[str, Field(description="Files with texts.")]
    column: Annotated[str, Field(description="The key or column that holds the text.")] = "text"
    limit: Annotated[int | None, Field(gt=1, description="The most texts to read.")] = None
    held_out: Annotated[float, Field(gt=0, lt=1, description="The share of texts that is held out.")] = 0.05
    bos: Annotated[Bos, Field(description="Begin each row with BOS; auto: if the tokenizer has one.")] = "auto"
    trust_remote_code: Annotated[bool, Field(description="Run code that comes with the model.")] = False

    def divided(self, texts: Iterable[Document], subject: Subject, *, eos: bool) -> tuple[TokenStore, np.ndarray]:
        """The texts as tokens, and which of them are held out ([D] booleans)."""
        store = tokenise(texts, subject.tokenizer, eos=eos)
        return store, held_out_documents(store.hashes, self.held_out, self.data)

    def data_identity(self, store: TokenStore) -> dict[str, Any]:
        """What identifies the tokens; the data's part of `protocols.Source.identity`."""
        return {"data": self.data, "data_digest": store.digest(), "held_out": self.held_out, "bos": self.bos}


def row_options(subject: Subject, context: int, bos: Bos) -> dict[str, Any]:
    """How rows of tokens are made for this model: their length, what begins them, and what fills them."""
    tokenizer = subject.tokenizer
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)  # is masked
    return {"context": context, "bos": first_token(tokenizer, bos), "pad": pad}


def packed(subject: Subject, store: TokenStore, chosen: np.ndarray, context: int, bos: Bos) -> PackedRows:
    """The rows of the documents that are `chosen` ([D] booleans)."""
    return PackedRows(store, np.flatnonzero(chosen), **row_options(subject, context, bos))
