"""The harvest: rows of tokens through the layers below the site, and what they give as blocks of activations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from saekit.activations.batch import Activations, SequenceBatch, TokenBatch
from saekit.activations.packing import Rows
from saekit.activations.shuffle import stop_point
from saekit.activations.subject import Subject
from saekit.errors import ComponentError, OptionError, UsageError
from saekit.seeds import derived_seed

ModelDtype = Literal["float32", "bfloat16"]
NO_TARGET = {"target": "For a transcoder, set source.target_hook_point."}
"""What a source that reads one site only withholds, and the fix."""


class HarvestSource:
    """What every source that reads text through a language model has in common; it implements `contracts.Source`.

    target_hook_point: for a transcoder, where to read what is rebuilt; both sites are read in one forward.

    A subclass sets `peek` and `prepare`: the latter loads a `Subject` and the `Rows` of each split. Row number r of
    "train" means the same tokens whenever it is asked for (given the seed), and block b is always the rows
    b * R to (b + 1) * R - 1, R depending on the block's size and the mean length of the rows alone.

    rows: rows a forward. drop_first: leave each row's first position out of the data (an attention sink, whose
    activation is like no other). drop_special: leave BOS, EOS and the other special tokens out as well.
    model_dtype: what the model computes in; activations are handed over in the dtype given to `open`.
    """

    subject: Subject
    withheld: dict[str, str]
    d_in: int
    d_out: int

    def __init__(
        self,
        *,
        hook_point: str,
        context: int,
        rows: int,
        drop_first: bool,
        drop_special: bool,
        model_dtype: ModelDtype,
        target_hook_point: str | None = None,
    ):
        self.hook_point: str = hook_point
        self.target_hook_point = target_hook_point
        self.withheld = {} if target_hook_point else dict(NO_TARGET)
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
            raise OptionError(
                "context", f"{self.context}, but {self.subject.name} takes {limit} tokens at most. Lower context."
            )
        self.d_in, self.d_out = self.subject.widths()
        self._special = np.asarray(
            sorted(self.subject.tokenizer.all_special_ids) if self.drop_special else [], dtype=np.int64
        )

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """Blocks `start`, `start + 1`, ... of about `size` activations; see `contracts.Source.blocks`.

        Each is one tensor [n, d_in] with its tokens, row numbers and positions. Memory: the block, and the activations
        of one forward; nothing here keeps a block once it is handed over.
        """
        count = self._split(split).count if split == "held_out" else None
        yield from self._numbered(split, size, seed, start, count)

    def first_pass(self, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """The blocks of "train" as far as the first pass goes; see `contracts.Source.first_pass`."""
        yield from self._numbered("train", size, seed, start, self._split("train").count)

    @property
    def pass_size(self) -> int:
        """About how many activations `first_pass` gives."""
        available = self._split("train")
        return round(available.count * max(1.0, available.length - self.drop_first))

    def _numbered(self, split: str, size: int, seed: int, start: int, count: int | None) -> Iterator[Activations]:
        """Blocks `start`, `start + 1`, ... of the first `count` rows, or of rows without end."""
        available = self._split(split)
        height = max(1, round(size / max(1.0, available.length - self.drop_first)))  # rows a block
        number = start
        while count is None or number * height < count:
            last = (number + 1) * height if count is None else min((number + 1) * height, count)
            yield self._block(available, np.arange(number * height, last), seed if split == "train" else None)
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
            "target_hook_point": self.target_hook_point,
            "context": self.context,
            "drop_first": self.drop_first,
            "drop_special": self.drop_special,
            "model_dtype": self.model_dtype,
        }

    def token_strings(self, tokens: Tensor) -> list[str]:
        """Each token id of a [n] tensor as readable text, with the space that a word begins with, if the token has it."""
        tokenizer = self.subject.tokenizer
        texts = {}
        for token in set(tokens.tolist()):
            text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
            piece = tokenizer.convert_ids_to_tokens(token) or ""
            # SentencePiece's way to decode leaves out the space at the beginning of a text, and this one is but a token.
            texts[token] = f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text
        return [texts[token] for token in tokens.tolist()]

    @property
    def special_tokens(self) -> list[int]:
        """The ids of BOS, EOS and the other tokens that stand for no text."""
        return sorted(self.subject.tokenizer.all_special_ids)

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
        place = torch.zeros_like(whole.tokens)  # [rows, T]: which activation of the block each position gives
        place[whole.keep] = torch.arange(len(row))
        x = torch.empty(len(row), self.d_in, dtype=self._dtype, device=self._device)  # [n, d_in]
        target = None if self.target_hook_point is None else x.new_empty(len(row), self.d_out)  # [n, d_out]
        for some, batch in self._forwards(whole):
            activations, targets = self.subject.pair(batch)  # [r, t, d_in], [r, t, d_out]
            # Indices come from the host, so that nothing waits for the device.
            into = place[some, : batch.keep.shape[1]][batch.keep].to(self._device)  # [k]
            at = tuple(index.to(self._device) for index in batch.keep.nonzero(as_tuple=True))  # [k], [k]
            x[into] = activations[at].to(x.dtype)
            if target is not None:
                target[into] = targets[at].to(x.dtype)
        tokens, sequence = whole.tokens.to(self._device), whole.sequence.to(self._device)
        known = available.labels(numbers, seed)
        labels = None if known is None else torch.from_numpy(known).to(self._device)[row]  # [n, n_concepts]
        return Activations(x, target, tokens[row, position], sequence[row], position, labels)

    def _forwards(self, whole: TokenBatch) -> Iterator[tuple[Tensor, TokenBatch]]:
        """The rows in portions for one forward: their places in `whole`, [r], and their tokens, cut to the longest.

        Rows of like length go together, so that little padding goes through the model."""
        lengths = whole.mask.sum(1)  # [rows]
        for some in lengths.argsort(stable=True).split(self.rows):
            stop_point()
            longest = int(lengths[some].max())
            tokens, mask, keep = (t[some, :longest] for t in (whole.tokens, whole.mask, whole.keep))
            yield some, TokenBatch(tokens, mask, keep, whole.sequence[some])


class LabelledHarvestSource(HarvestSource):
    """A harvest whose rows have labels: the second stream, `sequences`, beside the positions.

    A subclass's `prepare` also sets `concepts`, the names of the columns of labels, and `labelled`, for each split the
    rows that have one at least. They are other objects than the rows it returns, since a background thread reads those.
    """

    concepts: list[str]
    labelled: dict[str, Rows]

    def sequences(self, split: str, n: int, seed: int, number: int) -> SequenceBatch:
        """Batch `number` of `n` whole rows with labels, cut to the longest; see `contracts.Source.sequences`."""
        self._split(split)
        if split not in self.labelled:
            raise ComponentError(f"no row of the split {split!r} has a label, so there are no labelled sequences.")
        available = self.labelled[split]
        numbers, order = np.arange(number * n, (number + 1) * n), None
        if split == "held_out":
            numbers = numbers[numbers < available.count]
        else:
            order = derived_seed("sequences", seed)
        whole = self._tokens(available, numbers, order)
        longest = int(whole.mask.sum(1).max()) if len(numbers) else 0
        x = torch.zeros(len(numbers), longest, self.d_in, dtype=self._dtype, device=self._device)  # [n, T, d_in]
        target = None if self.target_hook_point is None else x.new_zeros(*x.shape[:2], self.d_out)  # [n, T, d_out]
        for some, batch in self._forwards(whole) if len(numbers) else ():
            row, position = batch.keep.nonzero(as_tuple=True)
            activations, targets = self.subject.pair(batch)  # [r, t, d_in], [r, t, d_out]
            into, row, position = (index.to(self._device) for index in (some[row], row, position))  # [k] each
            x[into, position] = activations[row, position].to(x.dtype)
            if target is not None:
                target[into, position] = targets[row, position].to(x.dtype)
        labels = torch.from_numpy(available.labels(numbers, order))
        mask, tokens = (t[:, :longest].to(self._device) for t in (whole.keep, whole.tokens))
        return SequenceBatch(x, mask, labels.to(self._device), tokens, target)


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
