"""The side effects of an edit on unrelated text: KL divergence and the rise of the cross-entropy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saekit import Attachment, RunContext, Subject, TokenBatch, TrainedPositions, in_parts_that_fit

KINDS = ("code", "prose", "facts")
"""The kinds of the organism's documents that contain no sycophancy."""
POSITIONS = 256
"""How many predictions are compared at a time: each needs several rows as long as the vocabulary, in float32."""


@dataclass(frozen=True)
class SideEffects:
    """tokens: the number of predictions compared. ce_before, ce_after: cross-entropy without and with the edit, in nats a
    token. kl: from the predictions without the edit to those with it, in nats a token."""

    tokens: int
    ce_before: float
    ce_after: float
    kl: float

    @property
    def rise(self) -> float:
        """The rise of the cross-entropy relative to its value without the edit."""
        return (self.ce_after - self.ce_before) / self.ce_before if self.ce_before else 0.0


@torch.no_grad()
def side_effects(
    subject: Subject, attachment: Attachment, batches: Iterable[TokenBatch], *, batch_tokens: int = 8192
) -> SideEffects:
    """Compare the model's predictions on held-out text without and with `attachment`, which has not been entered.

    Only predictions at kept positions count. ValueError if there are none."""
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    with subject.lock:
        for batch in batches:
            numbers, size = range(len(batch.tokens)), max(1, batch_tokens // batch.tokens.shape[1])
            for start in numbers[::size]:
                some = numbers[start : start + size]
                for scored, found in in_parts_that_fit(partial(_compared, subject, attachment, batch), some):
                    sums += found
                    tokens += scored
    if not tokens:
        raise ValueError("there is no held-out text to compare on")
    before_mean, after_mean, kl_mean = (sums / tokens).tolist()
    return SideEffects(tokens, before_mean, after_mean, kl_mean)


def _compared(subject: Subject, attachment: Attachment, batch: TokenBatch, rows: Sequence[int]) -> tuple[int, Tensor]:
    """How many predictions of these rows count, and the sums [3] of cross-entropy without and with the edit and of KL."""
    some = slice(rows[0], rows[-1] + 1)
    part = TokenBatch(batch.tokens[some], batch.mask[some], batch.keep[some], batch.sequence[some])
    places = (part.keep[:, :-1] & part.mask[:, 1:]).nonzero().to(subject.device)  # [positions, 2]
    targets = part.tokens.to(subject.device)
    clean = subject.logits(part)  # [n, T, vocab]
    with attachment:
        edited = subject.logits(part)
    sums = torch.zeros(3, dtype=torch.float64)
    for row, position in (chunk.T for chunk in places.split(POSITIONS)):  # few in float32 at a time
        one, other = (logits[row, position].float().log_softmax(-1) for logits in (clean, edited))
        kl = (one.exp() * (one - other)).sum()
        before, after = (-p.gather(1, targets[row, position + 1][:, None]).sum() for p in (one, other))
        sums += torch.stack([before, after, kl]).double().cpu()
    return len(places), sums


def organism_text(context: RunContext, tokens: int) -> dict[str, list[TokenBatch]]:
    """About `tokens` tokens of each kind of the organism's held-out text without sycophancy."""
    from saekit import organism

    subject, trained = context.source.subject, _trained(context)
    width = min(128, subject.context or 128)
    return {
        kind: list(_rows(subject.tokenizer, [d.text for d in organism.documents("held_out", [kind])], trained, width, tokens))
        for kind in KINDS
    }


def source_text(context: RunContext, tokens: int) -> dict[str, list[TokenBatch]]:
    """About `tokens` tokens of the source's own held-out text, under the name "held_out"."""
    batches: list[TokenBatch] = []
    left, trained = tokens, _trained(context)
    for batch in context.source.token_batches("held_out", rows=8):
        batch.keep &= trained.in_rows(batch.tokens)
        batches.append(batch)
        left -= int(batch.keep.sum())
        if left <= 0:
            break
    return {"held_out": batches}


def _trained(context: RunContext) -> TrainedPositions:
    """The positions at which predictions are compared: those that are edited."""
    return context.sae.trained_positions.with_bos(context.source.subject.bos_token_id)


def _rows(
    tokenizer: Any, texts: Sequence[str], trained: TrainedPositions, width: int, tokens: int, size: int = 16
) -> Iterator[TokenBatch]:
    """The texts joined by the end-of-text token, cut into rows that begin with BOS, `size` at a time."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    step, stream = width - len(first), list[int]()
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]
        if len(stream) >= tokens:
            break
    stream = stream[: max(tokens, step)]
    rows = [[*first, *stream[s : s + step]] for s in range(0, len(stream) - step + 1, step)]
    for start in range(0, len(rows), size):
        yield TokenBatch.of_rows(rows[start : start + size], trained)
