"""What a method trains on, as tokens: texts to forget, texts of what is to stay and may be shown, and any other text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from saekit import Subject, UsageError
from saekit_unlearning.data import Text
from saekit_unlearning.passages import Site
from saekit_unlearning.places import placed

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """tokens: of a text up to the one before its last; following: those that come after each of them.

    name: the position of the last token of the entity's name. answer: the positions that predict the answer's tokens.
    """

    tokens: list[int]
    following: list[int]
    name: int = 0
    answer: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rows:
    """tokens, following: [n, T] ids. mask: [n, T], False at padding. answer: [n, T], where the answer is predicted. names: [n]."""

    tokens: Tensor
    following: Tensor
    mask: Tensor
    answer: Tensor
    names: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Rows:
        """Rows padded on the right with 0."""
        n, width = len(rows), max(len(row.tokens) for row in rows)
        tokens, following = torch.zeros(n, width, dtype=torch.long), torch.zeros(n, width, dtype=torch.long)
        mask, answer = torch.zeros(n, width, dtype=torch.bool), torch.zeros(n, width, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
            following[i, : len(row.tokens)] = torch.tensor(row.following)
            mask[i, : len(row.tokens)] = True
            answer[i, list(row.answer)] = True
        names = torch.tensor([row.name for row in rows])
        return cls(*(tensor.to(device) for tensor in (tokens, following, mask, answer, names)))


@dataclass(frozen=True)
class Material:
    """site: of the subject's own model, which no method changes.

    general: rows of any text that is to stay, such as code and prose; there may be none.
    batch, general_batch: how many texts of each kind, and rows of general text, make one step.
    """

    site: Site
    forget: Sequence[Row]
    retain: Sequence[Row]
    general: Sequence[Row] = ()
    batch: int = 16
    general_batch: int = 4

    @classmethod
    def of(
        cls,
        site: Site,
        forget: Sequence[Text],
        retain: Sequence[Text],
        general: Sequence[Sequence[int]] = (),
        *,
        batch: int = 16,
        general_batch: int = 4,
    ) -> Material:
        """From texts, and general text as rows of token ids."""
        others = [Row(list(ids[:-1]), list(ids[1:])) for ids in general if len(ids) > 1]
        return cls(site, rows_of(site.subject, forget), rows_of(site.subject, retain), others, batch, general_batch)

    def batches(self, seed: int) -> Iterator[tuple[Rows, list[Rows]]]:
        """Without end: (texts to forget, [texts to stay, general text]), each in a new random order every time around."""
        draws, device = np.random.default_rng(seed), self.site.subject.device
        stay = [
            endless(rows, size, draws)
            for rows, size in ((self.retain, self.batch), (self.general, self.general_batch))
            if rows
        ]
        for forget in endless(self.forget, self.batch, draws):
            yield Rows.of(forget, device), [Rows.of(next(rows), device) for rows in stay]


def rows_of(subject: Subject, texts: Sequence[Text]) -> list[Row]:
    """Texts up to the last token of their answer, which is only predicted; those longer than the model's context are left out.

    UsageError if that leaves none of them."""
    rows = []
    for text in texts:
        one, ids = placed(subject.tokenizer, text), subject.tokenizer(text.text, verbose=False)["input_ids"]
        if subject.context is not None and len(one.tokens) > subject.context:
            continue
        rows.append(Row(one.tokens, ids[1 : len(one.tokens) + 1], one.name, tuple(one.answer)))
    if texts and not rows:
        raise UsageError(
            f"each of the {len(texts)} texts about {texts[0].group!r} has more tokens than the model's context, {subject.context}. "
            "Shorten them."
        )
    return rows


def endless(items: Sequence[T], size: int, draws: np.random.Generator) -> Iterator[list[T]]:
    """`size` of the items at a time (all, if there are fewer), in a new random order every time around."""
    size = min(size, len(items))
    while True:
        order = draws.permutation(len(items))
        for start in range(0, len(items) - size + 1, size):
            yield [items[i] for i in order[start : start + size]]
