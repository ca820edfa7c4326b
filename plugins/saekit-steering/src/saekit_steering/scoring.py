"""What a push does to the model's predictions and to the cluster, read in one forward at the steered site, after the edit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import saekit
from saekit import Attachment, Code, Recording, Replay, RunContext, Subject, own_numerics
from saekit_steering.cluster import Cluster
from saekit_steering.prompts import PromptBatch
from saekit_steering.steering_vectors import Push
from saekit_steering.typical_tokens import TypicalTokens

HELD_OUT = "held-out text"
"""The kind of the batches that are the source's own held-out text and no prompts."""
Readings = dict[int, tuple[Tensor, "Tensor | None"]]
"""By a prompt's number: f and g [T - 1, m] at its positions, the first left out; g is None without a graph."""


@dataclass
class Score:
    """Sums over the positions of one kind of prompts; the properties and `mean` divide by their number.

    log_odds: of the concept's typical tokens next. probability: of any token typical of it. kl: from the predictions without
    the push to those with it, in nats. f, g: [m]. lens: the output score over `ends` last positions."""

    positions: int = 0
    log_odds: float = 0.0
    probability: float = 0.0
    kl: float = 0.0
    f: Tensor | None = None
    g: Tensor | None = None
    lens: float = 0.0
    ends: int = 0

    def mean(self, name: str) -> float:
        """`log_odds`, `probability` or `kl` a position."""
        return getattr(self, name) / self.positions

    def pooled(self, name: str) -> Tensor | None:
        """The mean of `f` or `g` over positions: [m], None where it was not read."""
        total = getattr(self, name)
        return None if total is None else total / self.positions

    @property
    def output_score(self) -> float | None:
        """The mean output score; None where it was not asked for."""
        return self.lens / self.ends if self.ends else None


Scores = dict[str, Score]


@dataclass
class Measured:
    """clean: scores without any push, by kind. pushed: those of each push. readings_before: of every prompt. readings: of
    every prompt under each push of the steered latent, by the push's number."""

    clean: Scores = field(default_factory=dict)
    pushed: list[Scores] = field(default_factory=list)
    readings_before: Readings = field(default_factory=dict)
    readings: dict[int, Readings] = field(default_factory=dict)


@dataclass(frozen=True)
class _Seen:
    """One forward: log-probabilities [n, T, vocabulary], f and g [n, T, m]."""

    log_p: Tensor
    f: Tensor
    g: Tensor | None


class Measure:
    """context: the finished run. cluster: whose f and g are read. typical: the concept's tokens.

    The steered latent is edited and read in whole forwards, through `saekit.attach` and `saekit.read`. Of the controls, of
    which there are many, only the layers above the site run again (`saekit.Replay`); the figures are the same."""

    def __init__(self, context: RunContext, cluster: Cluster, typical: TypicalTokens) -> None:
        self.context, self.cluster, self.typical = context, cluster, typical
        self.subject: Subject = context.source.subject
        self._replay = Replay(self.subject.model, self.subject.site)

    @torch.no_grad()
    def __call__(self, pushes: Sequence[Push], batches: Iterable[PromptBatch], lens: dict[int, Tensor]) -> Measured:
        """Every push on every batch. lens: for the numbers of some pushes, the ids of their logit-lens tokens."""
        found = Measured(pushed=[{} for _ in pushes])
        for batch in batches:
            with self.subject.lock:
                clean = self._seen(batch, None)
                self._take(found.clean, batch, clean, clean, None)
                found.readings_before.update(_readings(batch, clean))
                recording = None
                for number, push in enumerate(pushes):
                    if push.kind == "latent":
                        seen = self._seen(batch, push.edit(self.subject))
                        found.readings.setdefault(number, {}).update(_readings(batch, seen))
                    else:
                        recording = recording or self._recorded(batch)
                        seen = self._replayed(recording, push)
                    self._take(found.pushed[number], batch, clean, seen, lens.get(number))
        return found

    def _seen(self, batch: PromptBatch, edit: Attachment | None) -> _Seen:
        """A whole forward, with the edit if there is one."""
        reader = saekit.read(self.subject.model, self.context.sae, self.subject.site, after=[edit] if edit else [])
        with saekit.attach_all([edit, reader] if edit else [reader]):
            logits = self.subject.logits(batch.tokens)
            return self._of(logits, reader.code)

    def _recorded(self, batch: PromptBatch) -> Recording:
        mask = batch.tokens.mask.to(self.subject.device)
        return self._replay.record(batch.tokens.tokens.to(self.subject.device), None if bool(mask.all()) else mask)

    def _replayed(self, recording: Recording, push: Push) -> _Seen:
        """What a forward with the push gives, from the site up."""
        sae, activation = self.context.sae, push.added_to(recording.activation)
        output = self._replay.run(recording, activation)
        with own_numerics(sae, activation.device):
            code = sae.encode(activation.flatten(0, 1).to(sae.W_dec.dtype))
            return self._of(output if isinstance(output, Tensor) else output.logits, code)

    def _of(self, logits: Tensor, code: Code) -> _Seen:
        f, g = self.cluster.read(code)
        lead = logits.shape[:2]
        return _Seen(logits.float().log_softmax(-1), f.view(*lead, -1), None if g is None else g.view(*lead, -1))

    def _take(self, scores: Scores, batch: PromptBatch, clean: _Seen, seen: _Seen, lens: Tensor | None) -> None:
        kinds = list(dict.fromkeys(batch.kinds))
        for kind in kinds:
            chosen = torch.tensor([k == kind for k in batch.kinds])[:, None] & batch.tokens.keep  # [n, T]
            chosen = chosen.to(seen.log_p.device)
            before, after = clean.log_p[chosen], seen.log_p[chosen]  # [p, vocabulary]
            score = scores.setdefault(kind, Score())
            score.positions += len(after)
            score.log_odds += float(self.typical.log_odds(after).double().sum())
            score.probability += float(after[:, self.typical.positive].exp().double().sum())
            score.kl += float((before.exp() * (before - after)).double().sum())
            score.f = _plus(score.f, seen.f[chosen])
            score.g = None if seen.g is None else _plus(score.g, seen.g[chosen])
            if lens is not None and kind != HELD_OUT:
                rows = chosen.any(1).nonzero()[:, 0]
                last = batch.tokens.mask.sum(1).to(rows.device)[rows] - 1
                gain = output_score(seen.log_p[rows, last], lens) - output_score(clean.log_p[rows, last], lens)
                score.lens, score.ends = score.lens + float(gain.double().sum()), score.ends + len(gain)


def output_score(log_p: Tensor, tokens: Tensor) -> Tensor:
    """[n, vocabulary], [k] -> [n]: (1 - rank / vocabulary) * p of the likeliest of the tokens, rank 0 the likeliest of all.

    Its rise under steering is the output score, after Arad, Mueller and Belinkov (2025), with the latent's logit-lens
    tokens: it tells latents that write something from those that only respond to something."""
    best = log_p[:, tokens.to(log_p.device)].max(1).values  # [n]
    rank = (log_p > best[:, None]).sum(1)
    return (1 - rank / log_p.shape[1]) * best.exp()


def logit_lens(subject: Subject, row: Tensor, k: int) -> Tensor | None:
    """The ids [k] of the tokens whose rows of the unembedding have the largest product with a direction [d]; None where
    the model has no unembedding of that width. The final norm is left out."""
    model: Any = getattr(subject.model, "original_model", subject.model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None or weight.shape[1] != row.shape[0]:
        return None
    return (weight.float() @ row.to(weight.device).float()).topk(k).indices


def held_out_text(context: RunContext, tokens: int) -> Iterable[PromptBatch]:
    """About `tokens` tokens of the source's held-out text, as batches of the kind `HELD_OUT`."""
    left = tokens
    for batch in context.source.token_batches("held_out", rows=8):
        if left <= 0:
            return
        yield PromptBatch([], [HELD_OUT] * len(batch.tokens), batch)
        left -= int(batch.keep.sum())


def _readings(batch: PromptBatch, seen: _Seen) -> Readings:
    found: Readings = {}
    for row, number in enumerate(batch.numbers):
        keep = batch.tokens.keep[row]
        found[number] = seen.f[row].cpu()[keep], None if seen.g is None else seen.g[row].cpu()[keep]
    return found


def _plus(total: Tensor | None, rows: Tensor) -> Tensor:
    added = rows.double().sum(0).cpu()
    return added if total is None else total + added
