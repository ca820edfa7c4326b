"""Other text, which says nothing of the facts: for methods to see, and held out to measure what an edit does to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from saekit import RunContext
from saekit_unlearning.answers import Logits
from saekit_unlearning.kl import retain_kl
from saekit_unlearning.passages import Passages, Site

KINDS = ("code", "prose")
"""The kinds of the organism's held-out documents that say nothing of what is to be forgotten."""
WIDTH = 128
"""Documents are cut to this many tokens."""


@dataclass(frozen=True)
class Damage:
    """tokens: how many predictions were compared. kl: KL(unedited || edited), ce_rise: by how much the cross-entropy with the
    text rises; both in nats a token."""

    tokens: int
    kl: float
    ce_rise: float


def other_text(
    context: RunContext, site: Site, tokens: int, split: str, *, organism: bool
) -> dict[str, list[list[int]]]:
    """Rows of about `tokens` tokens of each kind: of the organism's code and prose, or else of the source's own text.

    split: "train" or "held_out"."""
    rows = (
        {kind: _organism_rows(site, kind, split) for kind in KINDS}
        if organism
        else {split: _source_rows(context, split)}
    )
    return {kind: _first(some, tokens) for kind, some in rows.items()}


@torch.no_grad()
def damage(site: Site, texts: Mapping[str, Sequence[Passages]], logits: Logits) -> dict[str, Damage]:
    """That of other logits than the model's own, for each kind."""
    found = {}
    for kind, batches in texts.items():
        sums, tokens = torch.zeros(2, dtype=torch.float64), 0
        for passages in batches:
            predicts = passages.keep[:, :-1] & passages.mask[:, 1:]  # [n, T - 1]
            following = passages.tokens[:, 1:][predicts][:, None]  # [k, 1]
            before, after = (
                of(passages)[:, :-1][predicts].float().log_softmax(-1) for of in (site.logits, logits)
            )  # [k, vocab]
            sums += torch.stack([retain_kl(before, after).sum(), (before - after).gather(1, following).sum()]).double().cpu()
            tokens += len(following)
        if tokens:
            found[kind] = Damage(tokens, *(sums / tokens).tolist())
    return found


def _organism_rows(site: Site, kind: str, split: str) -> Iterator[list[int]]:
    from saekit import organism

    width = min(WIDTH, site.subject.context or WIDTH)
    for document in organism.documents(split, [kind]):
        yield site.subject.tokenizer(document.text, verbose=False)["input_ids"][:width]


def _source_rows(context: RunContext, split: str) -> Iterator[list[int]]:
    for batch in context.source.token_batches(split, rows=8):
        for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
            yield tokens[mask].tolist()


def _first(rows: Iterator[list[int]], tokens: int) -> list[list[int]]:
    found: list[list[int]] = []
    for row in rows:
        if tokens <= 0:
            break
        if len(row) > 1:
            found.append(row)
            tokens -= len(row)
    return found
