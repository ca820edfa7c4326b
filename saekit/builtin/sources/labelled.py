"""The source `labelled`: texts with labels through a language model, for losses and metrics that need concepts."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from saekit.activations.documents import Document, find_files, read_records, text_of
from saekit.activations.harvest import LabelledHarvestSource
from saekit.activations.packing import MixedRows, Rows, SequenceRows, TokenStore
from saekit.activations.subject import Subject
from saekit.builtin.sources.common import TextsSource, row_options
from saekit.builtin.sources.spans import SpannedText, SpanTokens, marked_tokens, read_spans
from saekit.errors import OptionError, UsageError, near_names

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True, eq=False, repr=False)
class LabelledSource(TextsSource, LabelledHarvestSource):
    """Activations of a language model on labelled texts: JSON Lines with a text and one or several labels.

    A label is 0, 1, true or false; null, or a missing key, leaves it unknown. It may also be a list of spans, [start, end] in
    characters: then it is 1 at the positions whose tokens share a character with one of them, and 0 at the text's others.
    Each text is one sequence without EOS; a text longer than the context is divided into sequences of similar length, each
    with the text's labels. A sequence with spans has the label 1 as a whole if one of its positions has.

    It gives two streams: shuffled positions, each with its labels, and whole sequences for losses that pool.
    The second leaves out texts without any known label. With `balance`, training takes every combination of labels
    (unknown counts as a value) equally often in both streams, so texts with rare ones are repeated more often.
    """

    data: Annotated[str, Field(description="A .jsonl file, a directory or glob of them.")]
    labels: Annotated[list[str], Field(description="Keys that hold 0, 1, true, false, null, or spans of characters.")] = field(
        default_factory=list
    )
    classes: Annotated[
        str | None, Field(description="A key that holds the name of a class: one label for each class.")
    ] = None
    span_tokens: Annotated[
        SpanTokens, Field(description="Which tokens of a span have its label: all, or the last, where names are complete.")
    ] = "all"
    balance: Annotated[bool, Field(description="Train on every combination of labels equally often.")] = False
    column: Annotated[str, Field(description="The key that holds the text.")] = "text"
    context: Annotated[int, Field(gt=1, description="The most tokens in a sequence.")] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = list(dict.fromkeys(self.labels))
        self.warnings: list[str] = []
        if not self.labels and self.classes is None:
            raise OptionError(
                "labels",
                'is missing. Name the keys that hold labels, labels = ["python"], or the one that holds '
                'the name of a class, classes = "language".',
            )

    @property
    def _keys(self) -> list[str]:
        return [*self.labels, *([self.classes] if self.classes else [])]

    def peek(self) -> dict[str, Any]:
        """Model and data by name, and the width for a residual hook point; see `protocols.Source.peek`."""
        self._files()
        return {**super().peek(), "data": f"{self.data}: {', '.join(self._keys)}"}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> tuple[Subject, dict[str, Rows], dict[str, Any]]:
        """Read the labels, load the model, then tokenise the texts."""
        self.peek()  # a missing file is found before anything else
        self.warnings.clear()
        self.concepts, labels = self._labels()  # [D, n_concepts]
        counts = self._count(labels)  # wrong labels are found before a model is loaded
        subject = self.load(device, dtype)
        documents = (Document(f"{path}:{number}", text) for path, number, _, text in self._records())
        store, held_out = self.divided(documents, subject, eos=False)
        elsewhere, marks = self._marked(store, subject, labels) if self._spanned else (labels, None)
        self._look_at_splits(labels, held_out)
        options = {"given": elsewhere, "marks": marks, **row_options(subject, self.context, self.bos)}
        known = ~np.isnan(labels).all(1)  # [D]
        splits: dict[str, Rows] = {}
        self.labelled = {}
        for split, chosen in (("train", ~held_out), ("held_out", held_out)):
            splits[split] = self._rows(store, chosen, labels, split, options)
            if (chosen & known).any():
                self.labelled[split] = self._rows(store, chosen & known, labels, split, options)
        identity = {**self.data_identity(store), "labels": counts, "balance": self.balance}
        if marks is not None:
            positions = dict(zip(self.concepts, marks.sum(0).tolist(), strict=True))
            identity["spans"] = {"positions": positions, "digest": hashlib.sha256(marks.tobytes()).hexdigest()}
        return subject, splits, identity

    def fingerprint(self) -> dict[str, Any] | None:
        """What determines the activations, without loading; see `protocols.Source.fingerprint`."""
        options = ("labels", "classes", "span_tokens", "balance", "column", "limit", "held_out", "bos")
        return self._fingerprint(self._files(), *options)

    # --- reading -----------------------------------------------------------------------------------------------

    def _files(self) -> list[Path]:
        files = find_files(self.data, (".jsonl",))
        if files is None:
            raise OptionError("data", f"{self.data!r}: there is no such file or directory. Name a .jsonl file.")
        return files

    def _records(self) -> Iterator[tuple[Path, int, dict[str, Any], str]]:
        """Every line with a text: file, line number, object, text."""
        return itertools.islice(self._all_records(), self.limit)

    def _all_records(self) -> Iterator[tuple[Path, int, dict[str, Any], str]]:
        for path in self._files():
            for number, record in read_records(path):
                text = text_of(record, path, number, self.column)
                if text.strip():
                    yield path, number, record, text

    def _labels(self) -> tuple[list[str], np.ndarray]:
        """The names of the concepts, and the labels of all texts: [D, n_concepts] float32, NaN if unknown."""
        table: list[list[float]] = []
        names: list[str | None] = []
        seen: set[str] = set()
        self._spanned: list[SpannedText] = []
        for path, number, record, text in self._records():
            seen |= set(record)
            place = f"{path}, line {number}"
            spans = {
                column: read_spans(record[key], key, text, place)
                for column, key in enumerate(self.labels)
                if isinstance(record.get(key), list)
            }
            if any(spans.values()):
                self._spanned.append(SpannedText(place, len(table), text, spans))
            table.append(
                [
                    float(bool(spans[column])) if column in spans else label_of(record.get(key), key, place)
                    for column, key in enumerate(self.labels)
                ]
            )
            if self.classes is not None:
                names.append(class_of(record.get(self.classes), self.classes, path, number))
        self._with_spans = {self.labels[column] for one in self._spanned for column, spans in one.spans.items() if spans}
        for key in self._keys:
            if key not in seen:
                raise OptionError(
                    "labels",
                    f"no line of {self.data} has the key {key!r}.{near_names(key, seen)} "
                    f"Keys: {', '.join(map(repr, sorted(seen))) or 'none'}.",
                )
        labels = np.asarray(table, dtype=np.float32).reshape(len(table), len(self.labels))
        if self.classes is None:
            return self.labels, labels
        found = sorted({name for name in names if name is not None})
        if len(found) < 2:
            raise OptionError(
                "classes",
                f"{self.classes!r} is {f'{found[0]!r} wherever it is given' if found else 'never given'} in "
                f"{self.data}. Give at least two classes.",
            )
        twice = sorted(set(found) & set(self.labels))
        if twice:
            raise OptionError("classes", f"the class {twice[0]!r} has the name of a label. Rename one of the two.")
        of_class = np.asarray([[np.nan if name is None else name == other for other in found] for name in names])
        return [*self.labels, *found], np.concatenate([labels, of_class.astype(np.float32)], 1)

    def _count(self, labels: np.ndarray) -> dict[str, dict[str, int]]:
        """How many texts have which label. OptionError for a label with only one value; a warning for unknown labels."""
        counts = {}
        for name, column in zip(self.concepts, labels.T, strict=True):
            zeros, ones, unknown = (int(n.sum()) for n in (column == 0, column == 1, np.isnan(column)))
            counts[name] = {"0": zeros, "1": ones, "unknown": unknown}
            if (zeros == 0 and name not in self._with_spans) or ones == 0:
                there = f"{int(ones > 0)} in all {zeros + ones} texts of {self.data} that have it"
                raise OptionError(
                    "labels",
                    f"{name!r} is {there if zeros + ones else f'unknown for every text of {self.data}'}. "
                    f"Add texts for which it is {'0' if ones else '1'}, or leave the label out.",
                )
            if unknown:
                self.warnings.append(
                    f"The label {name!r} is unknown for {unknown} of {len(column)} texts of {self.data}."
                )
        return counts

    def _look_at_splits(self, labels: np.ndarray, held_out: np.ndarray) -> None:
        """OptionError if all training texts have the same label; a warning if all held-out texts have."""
        for name, column in zip(self.concepts, labels.T, strict=True):
            for value in (0, 1):
                if value == 0 and name in self._with_spans:  # beside a span there are positions without the label
                    continue
                if not (column[~held_out] == value).any():
                    raise OptionError(
                        "held_out",
                        f"all {int((column == value).sum())} texts for which {name!r} is {value} fell among "
                        "the held-out ones. Give more of them, or lower held_out.",
                    )
                if not (column[held_out] == value).any():
                    self.warnings.append(
                        f"No held-out text has {name!r} = {value}, so what compares the two is not defined there. Give "
                        "more texts, or raise source.held_out."
                    )

    # --- rows --------------------------------------------------------------------------------------------------

    def _marked(self, store: TokenStore, subject: Subject, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The labels of the positions without a span, [D, n_concepts], and which tokens have one, [N, n_concepts] booleans."""
        marks, warnings = marked_tokens(self._spanned, store, self.concepts, subject.tokenizer, self.span_tokens)
        self.warnings += warnings
        elsewhere = labels.copy()
        for spanned in self._spanned:
            elsewhere[spanned.document, [column for column, spans in spanned.spans.items() if spans]] = 0
        self._spanned.clear()  # it holds texts
        return elsewhere, marks

    def _rows(
        self, store: TokenStore, chosen: np.ndarray, labels: np.ndarray, split: str, options: dict[str, Any]
    ) -> Rows:
        """The rows of some texts ([D] booleans); in training balanced by the texts' labels, if the option says so."""
        if not self.balance or split == "held_out":
            return SequenceRows(store, np.flatnonzero(chosen), **options)
        kinds, of_text = np.unique(np.nan_to_num(labels, nan=2.0), axis=0, return_inverse=True)
        texts = [np.flatnonzero(chosen & (of_text.ravel() == kind)) for kind in range(len(kinds))]
        parts = [SequenceRows(store, some, **options) for some in texts if len(some)]
        return MixedRows(parts, [1] * len(parts))


def label_of(value: Any, key: str, place: str) -> float:
    """A label as a number, NaN if it is unknown."""
    if value is None or (isinstance(value, float) and value != value):
        return float("nan")
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    raise UsageError(
        f"{place}: the label {key!r} is {value!r}. Write 0, 1, true or false, or null if it is not known; a list of spans, "
        f'[[0, 5]], for some of the positions; for the name of a class set classes = "{key}".'
    )


def class_of(value: Any, key: str, path: Path, number: int) -> str | None:
    """The name of a class, None if it is unknown."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, bool | int):
        return str(value)
    raise UsageError(f"{path}, line {number}: the class {key!r} is {value!r}. Write the class's name, or null.")
