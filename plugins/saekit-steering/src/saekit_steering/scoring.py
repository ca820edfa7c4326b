"""The effect of a steering vector on predictions and on the cluster, both read from one forward pass, after the edit."""

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
from saekit_steering.steering_vectors import SteeringVector
from saekit_steering.typical_tokens import TypicalTokens

HELD_OUT = "held-out text"
"""The kind of the batches of the source's held-out text, as opposed to prompts."""
Readings = dict[int, tuple[Tensor, "Tensor | None"]]
"""By the prompt's number: f and g [T - 1, m] at all its positions but the first; g is None without a graph."""


@dataclass
class Score:
    """Sums over the positions of one kind of prompt; the properties and `mean` divide by their number.

    log_odds: of a typical token of the concept coming next.
    probability: of such a token.
    kl: from the predictions without the vector to those with it, in nats.
    f, g: [m].
    lens: the output score, summed over `ends` last positions."""

    positions: int = 0
    log_odds: float = 0.0
    probability: float = 0.0
    kl: float = 0.0
    f: Tensor | None = None
    g: Tensor | None = None
    lens: float = 0.0
    ends: int = 0

    def mean(self, name: str) -> float:
        """`log_odds`, `probability` or `kl` per position."""
        return getattr(self, name) / self.positions

    def pooled(self, name: str) -> Tensor | None:
        """The mean of `f` or `g` over positions: [m], None if it was not read."""
        total = getattr(self, name)
        return None if total is None else total / self.positions

    @property
    def output_score(self) -> float | None:
        """The mean output score; None if it was not measured."""
        return self.lens / self.ends if self.ends else None


Scores = dict[str, Score]


@dataclass
class Scored:
    """unsteered: scores by kind without any vector. steered: those under each vector. readings_before: f and g of every
    prompt without a vector. readings: those under each vector of the steered latent, by the vector's number."""

    unsteered: Scores = field(default_factory=dict)
    steered: list[Scores] = field(default_factory=list)
    readings_before: Readings = field(default_factory=dict)
    readings: dict[int, Readings] = field(default_factory=dict)


@dataclass(frozen=True)
class _Forward:
    """One forward pass: log-probabilities [n, T, vocabulary], f and g [n, T, m]."""

    log_p: Tensor
    f: Tensor
    g: Tensor | None


class Scorer:
    """Scores steering vectors on prompts. cluster: the latents whose f and g are read. typical: the concept's tokens.

    The steered latent is edited and read in whole forward passes, through `saekit.attach` and `saekit.read`. For the
    many controls only the layers above the site run again (`saekit.Replay`), with the same result."""

    def __init__(self, context: RunContext, cluster: Cluster, typical: TypicalTokens) -> None:
        self.context, self.cluster, self.typical = context, cluster, typical
        self.subject: Subject = context.source.subject
        self._replay = Replay(self.subject.model, self.subject.site)

    @torch.no_grad()
    def __call__(self, vectors: Sequence[SteeringVector], batches: Iterable[PromptBatch], lens: dict[int, Tensor]) -> Scored:
        """Score every vector on every batch. lens: the logit-lens tokens of some vectors, by their numbers."""
        found = Scored(steered=[{} for _ in vectors])
        for batch in batches:
            with self.subject.lock:
                unsteered = self._forward(batch, None)
                self._take(found.unsteered, batch, unsteered, unsteered, None)
                found.readings_before.update(_readings(batch, unsteered))
                recording = None
                for number, vector in enumerate(vectors):
                    if vector.kind == "latent":
                        forward = self._forward(batch, vector.edit(self.subject))
                        found.readings.setdefault(number, {}).update(_readings(batch, forward))
                    else:
                        recording = recording or self._recorded(batch)
                        forward = self._replayed(recording, vector, batch.tokens.keep)
                    self._take(found.steered[number], batch, unsteered, forward, lens.get(number))
        return found

    def _forward(self, batch: PromptBatch, edit: Attachment | None) -> _Forward:
        """A whole forward pass, with the edit if there is one."""
        reader = saekit.read(self.subject.model, self.context.sae, self.subject.site, after=[edit] if edit else [])
        with saekit.attach_all([edit, reader] if edit else [reader]):
            logits = self.subject.logits(batch.tokens)
            return self._of(logits, reader.code)

    def _recorded(self, batch: PromptBatch) -> Recording:
        mask = batch.tokens.mask.to(self.subject.device)
        return self._replay.record(batch.tokens.tokens.to(self.subject.device), None if bool(mask.all()) else mask)

    def _replayed(self, recording: Recording, vector: SteeringVector, steered: Tensor) -> _Forward:
        """The forward pass with the vector at the positions `steered` [n, T], from the site up."""
        sae, activation = self.context.sae, vector.added_to(recording.activation, steered)
        output = self._replay.run(recording, activation)
        with own_numerics(sae, activation.device):
            code = sae.encode(activation.flatten(0, 1).to(sae.W_dec.dtype))
            return self._of(output if isinstance(output, Tensor) else output.logits, code)

    def _of(self, logits: Tensor, code: Code) -> _Forward:
        f, g = self.cluster.read(code)
        lead = logits.shape[:2]
        return _Forward(logits.float().log_softmax(-1), f.view(*lead, -1), None if g is None else g.view(*lead, -1))

    def _take(self, scores: Scores, batch: PromptBatch, unsteered: _Forward, forward: _Forward, lens: Tensor | None) -> None:
        kinds = list(dict.fromkeys(batch.kinds))
        for kind in kinds:
            chosen = torch.tensor([k == kind for k in batch.kinds])[:, None] & batch.tokens.keep  # [n, T]
            chosen = chosen.to(forward.log_p.device)
            before, after = unsteered.log_p[chosen], forward.log_p[chosen]  # [p, vocabulary]
            score = scores.setdefault(kind, Score())
            score.positions += len(after)
            score.log_odds += float(self.typical.log_odds(after).double().sum())
            score.probability += float(after[:, self.typical.positive].exp().double().sum())
            score.kl += float((before.exp() * (before - after)).double().sum())
            score.f = _plus(score.f, forward.f[chosen])
            score.g = None if forward.g is None else _plus(score.g, forward.g[chosen])
            if lens is not None and kind != HELD_OUT:
                rows = chosen.any(1).nonzero()[:, 0]
                last = batch.tokens.mask.sum(1).to(rows.device)[rows] - 1
                gain = output_score(forward.log_p[rows, last], lens) - output_score(unsteered.log_p[rows, last], lens)
                score.lens, score.ends = score.lens + float(gain.double().sum()), score.ends + len(gain)


def output_score(log_p: Tensor, tokens: Tensor) -> Tensor:
    """[n, vocabulary], [k] -> [n]: (1 - rank / vocabulary) * p of the likeliest of `tokens`, rank 0 being the likeliest of all.

    Its rise under steering, with the latent's logit-lens tokens, is the output score (after Arad, Mueller and Belinkov,
    2025). It tells latents that promote some output from those that only respond to an input."""
    best = log_p[:, tokens.to(log_p.device)].max(1).values  # [n]
    rank = (log_p > best[:, None]).sum(1)
    return (1 - rank / log_p.shape[1]) * best.exp()


def logit_lens(subject: Subject, row: Tensor, k: int) -> Tensor | None:
    """The ids [k] of the tokens whose unembedding rows have the largest product with a direction [d]; None if the model
    has no unembedding of that width. The final norm is left out."""
    model: Any = getattr(subject.model, "original_model", subject.model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None or weight.shape[1] != row.shape[0]:
        return None
    return (weight.float() @ row.to(weight.device).float()).topk(k).indices


def held_out_text(context: RunContext, tokens: int) -> Iterable[PromptBatch]:
    """About `tokens` tokens of the source's held-out text, as batches of the kind `HELD_OUT`."""
    trained = context.sae.trained_positions.with_bos(context.source.subject.bos_token_id)
    left = tokens
    for batch in context.source.token_batches("held_out", rows=8):
        if left <= 0:
            return
        batch.keep &= trained.in_rows(batch.tokens)
        yield PromptBatch([], [HELD_OUT] * len(batch.tokens), batch)
        left -= int(batch.keep.sum())


def _readings(batch: PromptBatch, forward: _Forward) -> Readings:
    found: Readings = {}
    for row, number in enumerate(batch.numbers):
        keep = batch.tokens.keep[row]
        found[number] = forward.f[row].cpu()[keep], None if forward.g is None else forward.g[row].cpu()[keep]
    return found


def _plus(total: Tensor | None, rows: Tensor) -> Tensor:
    added = rows.double().sum(0).cpu()
    return added if total is None else total + added
