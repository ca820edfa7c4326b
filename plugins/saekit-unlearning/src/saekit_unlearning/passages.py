"""Rows of tokens whose layers below the site are run once; an edit at the site runs those above it again.

Everything that edits the model at the SAE's site goes through here: scoring questions, training decoder rows or gates,
measuring damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saekit import Recording, Replay, Subject, TokenBatch, TrainedPositions

SiteEdit = Callable[["Passages"], Tensor]
"""From passages to the activation at the site that replaces theirs: [n, T, d], with gradients to whatever is trained."""


@dataclass(frozen=True)
class Passages:
    """Some rows of tokens with their activation at the site.

    rows: [n] numbers of the rows among all that were given.
    keep: [n, T], the positions that may be edited: those that the SAE was trained on, so no padding either.
    """

    rows: Tensor
    recording: Recording
    keep: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> Tensor:
        """[n, T] ids."""
        return self.recording.tokens

    @property
    def mask(self) -> Tensor:
        """[n, T], False at padding."""
        mask = self.recording.mask
        return torch.ones_like(self.tokens, dtype=torch.bool) if mask is None else mask

    @property
    def x(self) -> Tensor:
        """The activations of the positions that may be edited, row after row: [m, d]."""
        return self.recording.activation[self.keep]

    def with_x(self, x: Tensor) -> Tensor:
        """The activation at the site with `x` [m, d] at the positions that may be edited: [n, T, d]."""
        return self.recording.activation.masked_scatter(self.keep[..., None], x.to(self.recording.activation.dtype))

    def chosen(self, index: Tensor) -> Passages:
        """Some of the rows, by index [k]."""
        old = self.recording
        fields = {name: None if (v := getattr(old, name)) is None else v[index] for name in ("mask", "entered")}
        recording = replace(old, tokens=old.tokens[index], activation=old.activation[index], **fields)
        return Passages(self.rows[index], recording, self.keep[index])


class Site:
    """The site of a subject's SAE: records passages, and runs the layers above it on edited activations.

    trained: the positions that the SAE was trained on, `sae.trained_positions`.
    """

    def __init__(self, subject: Subject, trained: TrainedPositions) -> None:
        self.subject, self.trained = subject, trained
        self.replay = Replay(subject.model, subject.site)

    def passages(self, rows: Sequence[Sequence[int]], batch_tokens: int = 4096) -> Iterator[Passages]:
        """The rows of token ids as passages of rows of similar length, each of at most about `batch_tokens` tokens."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and len(rows[order[end]]) * (end + 1 - start) <= batch_tokens:
                end += 1
            chosen = order[start:end]
            batch = TokenBatch.of_rows([rows[i] for i in chosen], self.trained)
            device = self.subject.device
            with self.subject.lock:
                recording = self.replay.record(batch.tokens.to(device), batch.mask.to(device))
            yield Passages(torch.tensor(chosen, device=device), recording, batch.keep.to(device))
            start = end

    def logits(self, passages: Passages, edit: SiteEdit | None = None) -> Tensor:
        """The model's logits [n, T, vocab] with the edited activation at the site; without an edit, its own."""
        activation = passages.recording.activation if edit is None else edit(passages)
        with self.subject.lock:
            output: Any = self.replay.run(passages.recording, activation)
        return output if isinstance(output, Tensor) else output.logits
