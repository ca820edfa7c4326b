"""Spans: stretches of a text's characters that have a label, and the tokens that they cover."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from saekit.errors import OptionError, UsageError

if TYPE_CHECKING:
    from saekit.activations.packing import TokenStore

SpanTokens = Literal["all", "last"]


@dataclass(frozen=True)
class SpannedText:
    """A text with spans. place: its file and line. document: its number in the store. spans: [start, end) by column of labels."""

    place: str
    document: int
    text: str
    spans: dict[int, list[tuple[int, int]]]


def read_spans(value: list[Any], key: str, text: str, place: str) -> list[tuple[int, int]]:
    """A list of [start, end) in characters from 0. UsageError for one that is not a stretch of the text."""
    found = []
    for span in value:
        if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)):
            raise UsageError(
                f"{place}: the label {key!r} is a list that holds {span!r}. A list holds spans, each [start, end] in "
                "characters, such as [[0, 5], [12, 16]]."
            )
        start, end = span
        if not 0 <= start < end <= len(text):
            raise UsageError(
                f"{place}: the label {key!r} has the span {span}, but the text has {len(text)} characters. Give the first "
                "character, counted from 0, and the one after the last."
            )
        found.append((start, end))
    return found


def marked_tokens(
    texts: list[SpannedText], store: TokenStore, names: list[str], tokenizer: Any, tokens: SpanTokens
) -> tuple[np.ndarray, list[str]]:
    """Which tokens of the store a span covers, [N, n_concepts] booleans, and warnings of spans that cover none.

    A token is covered if it shares a character with the span; spaces at the span's ends do not count, because a token may
    begin with the space before its word.
    names: of the columns of labels.
    tokens: all that are covered, or the last of each span.

    OptionError for a tokenizer that cannot tell where tokens lie, and for a label none of whose spans covers a token."""
    if not getattr(tokenizer, "is_fast", False):
        raise OptionError(
            "labels",
            "has spans, but this model's tokenizer cannot tell where in a text its tokens lie (it has no fast version). Use a "
            "model with a fast tokenizer, or label whole texts.",
        )
    marks = np.zeros((len(store.ids), len(names)), dtype=bool)  # [N, n_concepts]
    nothing: list[tuple[int, str]] = []  # (column, place) of spans without a token
    for spanned in texts:
        found = tokenizer(spanned.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)  # [t, 2], in characters
        first = store.offsets[spanned.document]
        for column, start, end in _by_column(spanned):
            inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))  # [k]
            if not len(inside):
                nothing.append((column, f"{spanned.place}, [{start}, {end}]"))
            marks[first + (inside if tokens == "all" else inside[-1:]), column] = True
    warnings = []
    for column in sorted({column for column, _ in nothing}):
        places = [place for of, place in nothing if of == column]
        if not marks[:, column].any():
            raise OptionError(
                "labels", f"no span of {names[column]!r} covers a token: {places[0]}. Look at what the spans count from."
            )
        warnings.append(
            f"{len(places)} span(s) of the label {names[column]!r} cover no token and mark nothing; the first is in {places[0]}."
        )
    return marks, warnings


def _by_column(spanned: SpannedText) -> Iterator[tuple[int, int, int]]:
    """Each span's column, start and end, without the spaces at its ends unless it holds nothing else."""
    for column, spans in spanned.spans.items():
        for start, end in spans:
            piece = spanned.text[start:end]
            if piece.strip():
                start, end = start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
            yield column, start, end
