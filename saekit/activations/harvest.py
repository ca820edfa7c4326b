"""The harvest: rows of tokens through the layers below the site, and what they give as blocks of activations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from saekit.activations.batch import Activations, TokenBatch
from saekit.activations.packing import Rows
from saekit.activations.shuffle import stop_point
from saekit.activations.subject import Subject
from saekit.errors import UsageError

ModelDtype = Literal["float32", "bfloat16"]


class HarvestSource:
    """What every source that reads text through a language model has in common; it implements `contracts.Source`.

    A subclass sets `peek` and `prepare`: the latter loads a `Subject` and the `Rows` of each split. Row number r of
    "train" means the same tokens whenever it is asked for (given the seed), and block b is always the rows
    b * R to (b + 1) * R - 1, R depending on the block's size and the context alone.

    rows: rows a forward. drop_first: leave each row's first position out of the data (an attention sink, whose
    activation is like no other). drop_special: leave BOS, EOS and the other special tokens out as well.
    model_dtype: what the model computes in; activations are handed over in the dtype given to `open`.
    """

    subject: Subject
    d_in: int
    d_out: int

    def __init__(
        self, *, hook_point: str, context: int, rows: int, drop_first: bool, drop_special: bool, model_dtype: ModelDtype
    ):
        self.hook_point: str = hook_point
        self.context = context
        self.rows = rows
        self.drop_first = drop_first
        self.drop_special = drop_special
        self.model_dtype = model_dtype

    def peek(self) -> dict[str, Any]:
        """What is known without loading; see `contracts.Source.peek`."""
        raise NotImplementedError

    def prepare(self, device: torch.device, dtype: torch.dtype) -> tuple[Subject, dict[str, Rows], dict[str, Any]]:
        """The subject, the rows of "train" and "held_out", and what identifies the data."""
        raise NotImplementedError

    def open(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load model and data. UsageError for whatever of them cannot be used."""
        self._dtype = dtype
        self._device = torch.device(device)
        self.subject, self._splits, self._data = self.prepare(self._device, getattr(torch, self.model_dtype))
        limit = self.subject.context
        if limit is not None and self.context > limit:
            raise UsageError(
                f"context = {self.context}: {self.subject.name} takes {limit} tokens at most. Lower context."
            )
        self.d_in = self.d_out = self.subject.width()
        self._special = np.asarray(
            sorted(self.subject.tokenizer.all_special_ids) if self.drop_special else [], dtype=np.int64
        )

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """Blocks `start`, `start + 1`, ... of about `size` activations; see `contracts.Source.blocks`.

        Each is one tensor [n, d_in] with its tokens, row numbers and positions. Memory: the block, and the activations
        of one forward; nothing here keeps a block once it is handed over.
        """
        available = self._split(split)
        height = max(1, round(size / (self.context - self.drop_first)))  # rows a block
        number = start
        while True:
            first, last = number * height, (number + 1) * height
            if split == "held_out":
                last = min(last, available.count)
                if first >= last:
                    return
            yield self._block(available, np.arange(first, last), seed if split == "train" else None)
            number += 1

    def token_batches(self, split: str, *, rows: int) -> Iterator[TokenBatch]:
        """Rows of tokens, in the order and numbering of `blocks` for "held_out"; for "train", once, unshuffled."""
        available = self._split(split)
        for first in range(0, available.count, rows):
            yield self._tokens(available, np.arange(first, min(first + rows, available.count)), None)

    def identity(self) -> dict[str, Any]:
        """What determines the activations; see `contracts.Source.identity`."""
        return {
            "model": self.subject.name,
            "model_digest": self.subject.digest(),
            "tokenizer_digest": _tokenizer_digest(self.subject.tokenizer),
            **self._data,
            "hook_point": self.hook_point,
            "context": self.context,
            "drop_first": self.drop_first,
            "drop_special": self.drop_special,
            "model_dtype": self.model_dtype,
        }

    def token_strings(self, tokens: Tensor) -> list[str]:
        """Each token id of a [n] tensor as readable text."""
        ids = tokens.tolist()
        texts = {i: self.subject.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in set(ids)}
        return [texts[i] for i in ids]

    def _split(self, split: str) -> Rows:
        if split not in self._splits:
            raise UsageError(f"split {split!r}: there are only {' and '.join(map(repr, self._splits))}.")
        return self._splits[split]

    def _tokens(self, available: Rows, numbers: np.ndarray, seed: int | None) -> TokenBatch:
        ids, mask = available.take(numbers, seed)  # [n, T], [n, T]
        keep = mask.copy()  # [n, T]
        if self.drop_first:
            keep[:, 0] = False
        if len(self._special):
            keep &= ~np.isin(ids, self._special)
        return TokenBatch(*map(torch.from_numpy, (ids, mask, keep, numbers.astype(np.int64))))

    def _block(self, available: Rows, numbers: np.ndarray, seed: int | None) -> Activations:
        whole = self._tokens(available, numbers, seed)
        row, position = (index.to(self._device) for index in whole.keep.nonzero(as_tuple=True))  # [n], [n]
        ends = [0, *whole.keep.sum(dim=1).cumsum(dim=0).tolist()]  # rows 0 to r give ends[r + 1] activations
        x = torch.empty(len(row), self.d_in, dtype=self._dtype, device=self._device)  # [n, d_in]
        for first in range(0, len(numbers), self.rows):
            stop_point()
            last = min(first + self.rows, len(numbers))
            part = slice(first, last)
            batch = TokenBatch(whole.tokens[part], whole.mask[part], whole.keep[part], whole.sequence[part])
            activations = self.subject.activations(batch)  # [last - first, T, d_in]
            kept = slice(ends[first], ends[last])
            x[kept] = activations[row[kept] - first, position[kept]]  # [k, d_in]; no wait for the device
        tokens, sequence = whole.tokens.to(self._device), whole.sequence.to(self._device)
        return Activations(x, tokens=tokens[row, position], sequence=sequence[row], position=position)


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
