"""Which multiple-choice questions the model answers right, under any edit at the site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saekit import TokenBatch
from saekit_unlearning.data import Question
from saekit_unlearning.passages import Passages, Site, SiteEdit

Logits = Callable[[Passages], Tensor]
"""From passages to logits [n, T, vocab]: what an edited model computes, or another model."""


@dataclass(frozen=True)
class Scored:
    """A row of tokens and the candidates that it scores.

    place: the position from which the first token of the candidates is predicted.
    candidates: their numbers, each with its tokens. Several single tokens share a row; a longer one is part of its own row.
    """

    question: int
    tokens: list[int]
    place: int
    candidates: list[tuple[int, list[int]]]


class Examination:
    """Questions, tokenised and recorded at the site once, to be answered under many edits.

    questions: those that fit the model's context; `too_long` counts the others.
    """

    def __init__(self, site: Site, questions: Sequence[Question], batch_tokens: int = 4096) -> None:
        self.site, self.questions, self.too_long = site, list[Question](), 0
        self._rows: list[Scored] = []
        context = site.subject.context
        for question in questions:
            rows = _rows(site.subject.tokenizer, question, len(self.questions))
            if context is not None and max(len(row.tokens) for row in rows) > context:
                self.too_long += 1
                continue
            self.questions.append(question)
            self._rows += rows
        self._passages = list(site.passages([row.tokens for row in self._rows], batch_tokens)) if self._rows else []

    def right(self, edit: SiteEdit | None = None) -> np.ndarray:
        """Which questions are answered right with `edit` at the site; without it, by the model as it is: [questions] bool."""
        return self.right_by(lambda passages: self.site.logits(passages, edit))

    def right_by(self, logits: Logits) -> np.ndarray:
        """The same with the logits of any model: [questions] bool."""
        return self.right_of(self.scores_by(logits))

    def right_of(self, scores: np.ndarray) -> np.ndarray:
        """Which questions are right by the log-likelihoods of their candidates: [questions, candidates] -> [questions] bool."""
        return scores.argmax(1) == np.array([q.answer for q in self.questions], dtype=int)

    @torch.no_grad()
    def scores_by(self, logits: Logits) -> np.ndarray:
        """The log-likelihood of each candidate by the logits of any model: [questions, candidates], -inf where there is none."""
        widest = max((len(q.candidates) for q in self.questions), default=0)
        scores = np.full((len(self.questions), widest), -np.inf)
        for passages, rows in self.batches():
            predicted = logits(passages)
            for own, row in zip(predicted, rows, strict=True):
                scores[row.question, [number for number, _ in row.candidates]] = log_likelihoods(own, row).tolist()
        return scores

    def batches(self) -> Iterator[tuple[Passages, list[Scored]]]:
        """Passages, and what is scored in each of their rows."""
        for passages in self._passages:
            yield passages, [self._rows[number] for number in passages.rows.tolist()]


def log_likelihoods(logits: Tensor, row: Scored) -> Tensor:
    """The log-likelihood of each candidate that a row scores, from its logits [T, vocab], with gradients: [candidates]."""
    longest = max(len(tokens) for _, tokens in row.candidates)
    log_p = logits[row.place : row.place + longest].float().log_softmax(-1)  # [longest, vocab]
    scored = [torch.tensor(tokens, device=log_p.device) for _, tokens in row.candidates]
    return torch.stack([log_p[: len(ids)].gather(1, ids[:, None]).sum() for ids in scored])


def of_model(model_logits: Callable[[TokenBatch], Tensor]) -> Logits:
    """The logits of a model that has been changed itself, which runs as a whole."""

    def logits(passages: Passages) -> Tensor:
        return model_logits(TokenBatch(passages.tokens, passages.mask, passages.keep, passages.rows))

    return logits


def _rows(tokenizer, question: Question, number: int) -> list[Scored]:
    """UsageError is not raised here: a candidate always adds at least one token to its prompt."""
    prompt = tokenizer(question.prompt, verbose=False)["input_ids"]
    whole = [tokenizer(question.prompt + c, verbose=False)["input_ids"] for c in question.candidates]
    # A tokenizer may join the end of the prompt with the candidate: what is scored begins where they first differ.
    start = min(len(prompt), *(_common(prompt, ids) for ids in whole))
    candidates = [(i, ids[start:]) for i, ids in enumerate(whole)]
    if all(len(tokens) == 1 for _, tokens in candidates):
        return [Scored(number, prompt[:start], start - 1, candidates)]
    return [Scored(number, whole[i][:-1], start - 1, [(i, tokens)]) for i, tokens in candidates]


def _common(a: list[int], b: list[int]) -> int:
    """The length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
