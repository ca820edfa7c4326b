"""Tokens typical of a concept and tokens typical of its absence, estimated from labelled text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saekit import ComponentError, OptionError, RunContext, SequenceBatch

SMOOTHING = 0.5
"""Added to every token's count (Jeffreys' prior), so that a token seen in one class only has a finite log-odds ratio."""


@dataclass(frozen=True)
class TypicalTokens:
    """positive, negative: ids of the tokens typical of texts with and without the concept, the most typical first.
    ratio: [vocabulary], the log-odds ratio of each token.
    counts: [2, vocabulary], in texts without and with."""

    positive: list[int]
    negative: list[int]
    ratio: Tensor
    counts: Tensor

    def log_odds(self, log_probabilities: Tensor) -> Tensor:
        """log P(a typical token of the concept) - log P(one of its absence): [..., vocabulary] -> [...]."""
        places = (torch.tensor(some, device=log_probabilities.device) for some in (self.positive, self.negative))
        with_it, without = (log_probabilities.index_select(-1, place).logsumexp(-1) for place in places)
        return with_it - without

    def share(self, tokens: list[int]) -> float | None:
        """Of the tokens in either set, the share in `positive`; None if there are none."""
        with_it, without = (sum(token in some for token in tokens) for some in map(set, (self.positive, self.negative)))
        return with_it / (with_it + without) if with_it + without else None

    def to_json(self, token_strings: Callable[[Tensor], list[str]]) -> dict[str, Any]:
        """Both sets with each token's text, log-odds ratio and counts."""
        return {
            name: [
                {
                    "token": token,
                    "text": text,
                    "log_odds_ratio": float(self.ratio[token]),
                    "count_with": int(self.counts[1, token]),
                    "count_without": int(self.counts[0, token]),
                }
                for token, text in zip(tokens, token_strings(torch.tensor(tokens)), strict=True)
            ]
            for name, tokens in (("positive", self.positive), ("negative", self.negative))
        }


def typical_tokens(counts: Tensor, size: int, min_count: int) -> TypicalTokens:
    """At most `size` tokens on either side, from counts [2, vocabulary] (without, with).

    Among the tokens seen at least `min_count` times in total, those with the largest log-odds ratio (for the absence, the
    smallest), `SMOOTHING` added to every count; its sign must agree. UsageError if a side is empty.
    """
    smoothed = counts.double() + SMOOTHING
    shares = smoothed / smoothed.sum(1, keepdim=True)
    odds = shares.log() - (1 - shares).log()
    ratio = odds[1] - odds[0]
    seen = counts.sum(0) >= min_count
    sides = []
    for name, sign in (("with", 1.0), ("without", -1.0)):
        score = (sign * ratio).masked_fill(~seen, -torch.inf)
        order = score.argsort(descending=True, stable=True)[:size]
        chosen = order[score[order] > 0].tolist()
        if not chosen:
            raise ComponentError(
                f"no token is typical of the texts {name} the concept among those seen at least "
                f"{min_count} times. Raise set_sequences, or lower min_count."
            )
        sides.append(chosen)
    return TypicalTokens(sides[0], sides[1], ratio, counts)


class TokenCounts:
    """How often each token occurs in texts without and with the concept of a label column: `counts` [2, vocabulary]."""

    def __init__(self, column: int, vocabulary: int) -> None:
        self.column, self.counts = column, torch.zeros(2, vocabulary, dtype=torch.int64)

    def add(self, batch: SequenceBatch) -> None:
        """Count a batch that has tokens."""
        for label in (0, 1):
            tokens = batch.tokens[of_class(batch, self.column, label)]  # type: ignore[index]
            self.counts[label] += torch.bincount(tokens.cpu(), minlength=self.counts.shape[1])


def of_class(batch: SequenceBatch, column: int, label: int) -> Tensor:
    """The positions with this label: [n, T]."""
    chosen = batch.mask.clone()
    chosen[batch.mask] = batch.labels_of_positions()[:, column] == label
    return chosen


def held_out_sequences(context: RunContext, column: int, n: int, size: int = 32) -> Iterator[SequenceBatch]:
    """At most `n` held-out labelled sequences, in batches: neither the SAE nor (for the organism) the model was trained on
    them. UsageError at once if the source has no tokens for them, and at the end if a class was missing."""
    seen = [0, 0]
    for number in range(-(-n // size)):
        batch = context.source.sequences("held_out", size, context.config.training.order_seed, number)
        if not len(batch):
            break
        if batch.tokens is None:
            raise ComponentError("the source's labelled sequences have no tokens. Use a source that reads text.")
        seen = [seen[label] + int(of_class(batch, column, label).sum()) for label in (0, 1)]
        yield batch
    for label, positions in enumerate(seen):
        if not positions:
            raise OptionError(
                "concept",
                f"no held-out sequence has the label {context.source.concepts[column]} = {label} "
                f"among the first {n}. Label texts of both classes, or raise set_sequences.",
            )


def concept_column(context: RunContext, name: str | None) -> int:
    """The label column of that name, the first by default. UsageError if there is none."""
    concepts = list(getattr(context.source, "concepts", []))
    if name is None and concepts:
        return 0
    if name not in concepts:
        raise OptionError("concept", f"the source has no label {name!r}. Its labels: {', '.join(concepts) or 'none'}.")
    return concepts.index(name)
