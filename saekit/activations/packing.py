"""Packing: documents as tokens, and rows of `context` tokens that can be addressed by number.

A packed row is BOS, if the model has one, and the next stretch of a stream of documents, each followed by EOS. The stream
of a pass holds every document once, in an order drawn from (seed, pass). Row r belongs to pass r // rows_a_pass, so any
row can be made without those before it, and a resumed run skips rows at no cost.

Held-out rows are the rows of the documents in their own order, each once, taken in an order that is the same for every run. So
the first of them come from all over the split, and a metric with a smaller budget sees the beginning of what the others see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from saekit.activations.documents import text_hash
from saekit.errors import OptionError, UsageError
from saekit.seeds import derived_seed

_BATCH_CHARACTERS = 2_000_000  # of text handed to the tokenizer at once


class HasText(Protocol):
    """Anything with an `id` and a `text`."""

    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class TokenStore:
    """Documents as tokens, held in memory: 4 bytes a token (8 while it is made) and 16 bytes a document.

    ids: [N] int32, every document's tokens followed by EOS (if the tokenizer has one).
    offsets: [D + 1] int64, document i is `ids[offsets[i]:offsets[i + 1]]`.
    hashes: [D] uint64, of each text.
    """

    ids: np.ndarray
    offsets: np.ndarray
    hashes: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)

    def digest(self) -> str:
        """sha256 of all tokens and of where the documents end."""
        return hashlib.sha256(self.ids.tobytes() + self.offsets.tobytes()).hexdigest()


def tokenise(documents: Iterable[HasText], tokenizer: Any, *, eos: bool = True) -> TokenStore:
    """Every document's tokens, without special tokens except an EOS after each; two megabytes of text at a time.

    eos: false leaves EOS out too, for documents that are not packed one after the other."""
    end = tokenizer.eos_token_id if eos else None
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    hashes: list[int] = []
    texts: list[str] = []

    def flush() -> None:
        # verbose=False: a document longer than the model's context is what packing is for, not worth a warning
        for tokens in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            ended = tokens if end is None else [*tokens, end]
            pieces.append(np.asarray(ended, dtype=np.int32))
            lengths.append(len(ended))
        texts.clear()

    waiting = 0
    for document in documents:
        texts.append(document.text)
        hashes.append(text_hash(document.text))
        waiting += len(document.text)
        if waiting >= _BATCH_CHARACTERS:
            flush()
            waiting = 0
    if texts:
        flush()
    return TokenStore(
        ids=np.concatenate([np.zeros(0, dtype=np.int32), *pieces]),  # [N]
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),  # [D + 1]
        hashes=np.asarray(hashes, dtype=np.uint64),  # [D]
    )


def held_out_order(count: int) -> np.ndarray:
    """The order in which `count` held-out things are taken, [count]: drawn once for all, so that runs can be compared."""
    return np.random.Generator(np.random.PCG64(derived_seed("held out order"))).permutation(count)


class Rows(Protocol):
    """Rows of tokens by number. `count`: how many rows hold every token once. `length`: tokens in a row, on average."""

    count: int
    length: float

    def take(self, numbers: np.ndarray, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows by number: [n] -> ids [n, context] int64 and mask [n, context], False at padding.

        seed: None for every row once, in `held_out_order` (numbers below `count`); a number for passes without end."""
        ...

    def documents(self, numbers: np.ndarray) -> np.ndarray:
        """The first and the last of the documents that each row of `take(numbers, None)` holds: [n] -> [n, 2] int64.

        A row holds all those between them as well: documents are numbered in their own order."""
        ...

    def labels(self, numbers: np.ndarray, seed: int | None) -> np.ndarray | None:
        """The labels of the same rows, [n, n_concepts] float32, NaN if unknown; None if no row has any."""
        ...

    def position_labels(self, numbers: np.ndarray, seed: int | None) -> np.ndarray | None:
        """The labels of each position of the same rows, [n, context, n_concepts]; None if all have those of their row."""
        ...


class PackedRows:
    """The rows of some documents of a store.

    documents: [m] indices into the store.
    bos: the token that begins each row, or None.
    pad: fills a short row. `count` is the number of rows in a pass; the last one may be short. UsageError if there are
        no tokens at all.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, *, context: int, bos: int | None, pad: int = 0):
        self.store = store
        self._documents = documents
        self.context = context
        self.bos = bos
        self.pad = pad
        self.length = float(context)
        self._width = _room(context, bos)  # tokens of the stream in a row
        self._lengths = np.diff(store.offsets)[documents]  # [m]
        self.tokens = int(self._lengths.sum())
        if self.tokens == 0:
            raise UsageError("the documents have no tokens at all. Give data that holds text.")
        self.count = -(-self.tokens // self._width)
        self._passes = Passes(len(documents), "pass", self._lengths)

    @cached_property
    def _held_out_order(self) -> np.ndarray:
        return held_out_order(self.count)

    def take(self, numbers: np.ndarray, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows by number; see `Rows.take`."""
        ids = np.full((len(numbers), self.context), self.pad, dtype=np.int64)  # [n, context]
        mask = np.ones((len(numbers), self.context), dtype=bool)  # [n, context]
        first = self.context - self._width
        if self.bos is not None:
            ids[:, 0] = self.bos
        passes, places = np.divmod(numbers, self.count)  # [n], [n]
        if seed is None:
            places = self._held_out_order[places]
        for number in np.unique(passes):
            chosen = np.flatnonzero(passes == number)  # [r]
            starts = places[chosen] * self._width
            positions = starts[:, None] + np.arange(self._width)  # [r, width], in the pass's stream
            inside = positions < self.tokens
            tokens = self._stream(positions[inside], seed, int(number))
            ids[chosen[:, None], np.arange(first, self.context)] = _scattered(tokens, inside, self.pad)
            mask[chosen[:, None], np.arange(first, self.context)] = inside
        return ids, mask

    def labels(self, numbers: np.ndarray, seed: int | None) -> None:
        """None: a row may hold several documents; see `Rows.labels`."""

    def position_labels(self, numbers: np.ndarray, seed: int | None) -> None:
        """None; see `Rows.position_labels`."""

    def documents(self, numbers: np.ndarray) -> np.ndarray:
        """The documents of held-out rows; see `Rows.documents`."""
        _, ends = self._passes.order(None, 0)
        starts = self._held_out_order[numbers] * self._width  # [n]
        last = np.minimum(starts + self._width, self.tokens) - 1
        return np.searchsorted(ends, np.stack([starts, last], 1), side="right")

    def _stream(self, positions: np.ndarray, seed: int | None, number: int) -> np.ndarray:
        """Tokens at some positions of a pass's stream of documents: [p] -> [p]."""
        order, ends = self._passes.order(seed, number)
        which = np.searchsorted(ends, positions, side="right")  # [p], place of the document in the pass
        documents = order[which]
        begins = ends[which] - self._lengths[documents]
        return self.store.ids[self.store.offsets[self._documents[documents]] + positions - begins]


class SequenceRows:
    """Each document in one row, or in several of similar length if it is longer than a row.

    documents: [m] indices into the store.
    given: [D, n_concepts] labels of all the store's documents, or None.
    marks: [N, n_concepts] booleans, the store's tokens whose label is 1 whatever their document's is; None if there are none.
    bos: the token that begins each row, or None.
    pad: fills the rest of a row. UsageError if there are no tokens.
    """

    def __init__(
        self,
        store: TokenStore,
        documents: np.ndarray,
        *,
        context: int,
        bos: int | None,
        pad: int = 0,
        given: np.ndarray | None = None,
        marks: np.ndarray | None = None,
    ):
        self.store, self.context, self.bos, self.pad = store, context, bos, pad
        width = _room(context, bos)
        lengths = np.diff(store.offsets)[documents]  # [m]
        if not lengths.any():
            raise UsageError("the documents have no tokens at all. Give data that holds text.")
        pieces = -(-lengths // width)  # [m], rows of each document
        self._documents = np.repeat(documents, pieces)  # [count], the document of each row
        which = np.arange(len(self._documents)) - np.repeat(
            np.cumsum(pieces) - pieces, pieces
        )  # [count], 0, 1, ... of it
        total, parts = np.repeat(lengths, pieces), np.repeat(pieces, pieces)
        self._starts, self._ends = which * total // parts, (which + 1) * total // parts  # [count] each, in the document
        self.count = len(self._documents)
        self.length = float((self._ends - self._starts).mean()) + (bos is not None)
        self._given, self._marks = given, marks
        self._passes = Passes(self.count, "sequences")

    @cached_property
    def _held_out_order(self) -> np.ndarray:
        return held_out_order(self.count)

    def take(self, numbers: np.ndarray, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows by number; see `Rows.take`."""
        inside, places = self._places(self._rows(numbers, seed))
        ids = np.full((len(numbers), self.context), self.pad, dtype=np.int64)  # [n, context]
        ids[inside] = self.store.ids[places]
        if self.bos is not None:
            ids[:, 0] = self.bos
            inside[:, 0] = True
        return ids, inside

    def labels(self, numbers: np.ndarray, seed: int | None) -> np.ndarray | None:
        """The labels of the rows' documents; with marks, 1 only where the row itself has one. See `Rows.labels`."""
        each = self.position_labels(numbers, seed)
        if each is not None:
            return each.max(1)  # NaN, at every position, stays NaN
        return None if self._given is None else self._given[self._documents[self._rows(numbers, seed)]]

    def position_labels(self, numbers: np.ndarray, seed: int | None) -> np.ndarray | None:
        """The labels of the rows' documents, and 1 where a token is marked; see `Rows.position_labels`."""
        if self._given is None or self._marks is None:
            return None
        rows = self._rows(numbers, seed)  # [n]
        inside, places = self._places(rows)
        labels = np.repeat(self._given[self._documents[rows]][:, None], self.context, 1)  # [n, context, n_concepts]
        labels[inside] = np.where(self._marks[places], np.float32(1), labels[inside])
        return labels

    def documents(self, numbers: np.ndarray) -> np.ndarray:
        """The document of each held-out row, twice; see `Rows.documents`."""
        return self._documents[self._rows(numbers, None)][:, None].repeat(2, 1)

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the text of the rows is, [n, context] booleans, and the place of each of its tokens in the store, [p]."""
        lengths = self._ends[rows] - self._starts[rows]  # [n]
        places = np.arange(self.context) - int(self.bos is not None)  # [context], of a row's text
        inside = (places >= 0) & (places < lengths[:, None])  # [n, context]
        begins = self.store.offsets[self._documents[rows]] + self._starts[rows]  # [n]
        return inside, (begins[:, None] + places)[inside]

    def _rows(self, numbers: np.ndarray, seed: int | None) -> np.ndarray:
        """Which rows the numbers mean: [n] -> [n]."""
        return self._held_out_order[numbers] if seed is None else self._passes.take(numbers, seed)


class MixedRows:
    """Several streams of rows, mixed in fixed proportions: `weights[k]` rows of `parts[k]` in every `sum(weights)`.

    With a seed every part passes over its documents as often as its share needs. Without a seed every row comes once;
    when a part is used up, the others continue in their proportions.

    given: [parts, n_concepts], the labels of each part's rows; None to ask the parts.
    """

    def __init__(
        self, parts: Sequence[PackedRows | SequenceRows], weights: list[int], *, given: np.ndarray | None = None
    ):
        self.parts = parts
        self.given = given
        self.length = float(np.average([part.length for part in parts], weights=weights))
        self.weights = np.asarray(weights)
        self.count = sum(part.count for part in parts)
        # Spread evenly: row j of a part with weight w stands at (j + 1/2) / w of the cycle.
        times = np.concatenate([(np.arange(w) + 0.5) / w for w in weights])
        kinds = np.repeat(np.arange(len(weights)), weights)
        ranks = np.concatenate([np.arange(w) for w in weights])
        cycle = np.argsort(times, kind="stable")
        self._kinds, self._ranks = kinds[cycle], ranks[cycle]  # [sum(weights)] each
        self._once: tuple[np.ndarray, np.ndarray] | None = None

    def take(self, numbers: np.ndarray, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows by number; see `Rows.take`."""
        kinds, within = self.places(numbers, seed)
        ids = np.empty((len(numbers), self.parts[0].context), dtype=np.int64)  # [n, context]
        mask = np.empty(ids.shape, dtype=bool)  # [n, context]
        for k, part in enumerate(self.parts):
            chosen = kinds == k
            if chosen.any():
                ids[chosen], mask[chosen] = part.take(within[chosen], seed)
        return ids, mask

    def labels(self, numbers: np.ndarray, seed: int | None) -> np.ndarray | None:
        """The labels of the rows' parts, or what the parts say; see `Rows.labels`."""
        if self.given is not None:
            return self.given[self.places(numbers, seed)[0]]
        return self._gathered(numbers, seed, lambda part, rows: part.labels(rows, seed))

    def position_labels(self, numbers: np.ndarray, seed: int | None) -> np.ndarray | None:
        """What the parts say, unless the labels are given; see `Rows.position_labels`."""
        if self.given is not None:
            return None
        return self._gathered(numbers, seed, lambda part, rows: part.position_labels(rows, seed))

    def _gathered(
        self, numbers: np.ndarray, seed: int | None, ask: Callable[[Rows, np.ndarray], np.ndarray | None]
    ) -> np.ndarray | None:
        """What each row's part says of it: [n, ...]; None if a part says nothing."""
        kinds, within = self.places(numbers, seed)
        answers = {k: ask(self.parts[k], within[kinds == k]) for k in np.unique(kinds)}
        first = next(iter(answers.values()), None)
        if first is None or any(answer is None for answer in answers.values()):
            return None
        found = np.empty((len(numbers), *first.shape[1:]), dtype=first.dtype)
        for k, answer in answers.items():
            found[kinds == k] = answer
        return found

    def documents(self, numbers: np.ndarray) -> np.ndarray:
        """The documents of held-out rows, numbered through all parts; see `Rows.documents`."""
        kinds, within = self.places(numbers, None)
        found = np.empty((len(numbers), 2), dtype=np.int64)
        for k, part in enumerate(self.parts):
            chosen = kinds == k
            found[chosen] = part.documents(within[chosen]) + (k << 40)
        return found

    def places(self, numbers: np.ndarray, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Which part each row comes from, [n], and its number there, [n]."""
        if seed is not None:
            cycles, slots = np.divmod(numbers, len(self._kinds))
            kinds = self._kinds[slots]
            return kinds, cycles * self.weights[kinds] + self._ranks[slots]
        if self._once is None:
            times = np.concatenate(
                [(np.arange(p.count) + 0.5) / w for p, w in zip(self.parts, self.weights, strict=True)]
            )
            order = np.argsort(times, kind="stable")
            counts = [part.count for part in self.parts]
            self._once = (
                np.repeat(np.arange(len(counts)), counts)[order],
                np.concatenate([np.arange(count) for count in counts])[order],
            )
        return self._once[0][numbers], self._once[1][numbers]


class Passes:
    """`count` things in pass after pass without end, each pass in an order drawn from (seed, pass).

    word: what they are, so that the same seed orders other things differently.
    lengths: [count], how long each is; 1 by default."""

    def __init__(self, count: int, word: str, lengths: np.ndarray | None = None):
        self.count, self.word = count, word
        self._lengths = np.ones(count, dtype=np.int64) if lengths is None else lengths
        self._orders: dict[tuple[int | None, int], tuple[np.ndarray, np.ndarray]] = {}

    def take(self, numbers: np.ndarray, seed: int) -> np.ndarray:
        """Which thing each number means: [n] -> [n]."""
        passes, places = np.divmod(numbers, self.count)  # [n], [n]
        found = np.empty_like(numbers)
        for number in np.unique(passes):
            chosen = passes == number
            found[chosen] = self.order(seed, int(number))[0][places[chosen]]
        return found

    def order(self, seed: int | None, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The things in the order of a pass, [count], and where each of them ends in it, [count]."""
        key = (seed, number)
        if key not in self._orders:
            while len(self._orders) >= 2:  # what is asked for together may span two passes
                del self._orders[next(iter(self._orders))]
            order = np.arange(self.count)
            if seed is not None:
                generator = np.random.Generator(np.random.PCG64(derived_seed(self.word, seed, number)))
                order = generator.permutation(self.count)
            self._orders[key] = order, np.cumsum(self._lengths[order])
        return self._orders[key]


def first_token(tokenizer: Any, bos: bool | Literal["auto"]) -> int | None:
    """The token that begins each row: BOS if asked for or, with `auto`, if the tokenizer has one."""
    if bos is False:
        return None
    if bos is True and tokenizer.bos_token_id is None:
        raise OptionError("bos", 'the tokenizer has no BOS token. Set bos = "auto" or false.')
    return tokenizer.bos_token_id


def _room(context: int, bos: int | None) -> int:
    """Tokens of text in a row."""
    room = context - (bos is not None)
    if room < 1:
        raise OptionError("context", f"{context}: leaves no room for text. Set context to 2 or more.")
    return room


def _scattered(tokens: np.ndarray, inside: np.ndarray, pad: int) -> np.ndarray:
    full = np.full(inside.shape, pad, dtype=np.int64)
    full[inside] = tokens
    return full
