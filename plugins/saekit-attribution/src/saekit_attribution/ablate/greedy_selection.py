"""Greedy joint selection: a set of latents whose ablation together restores the base answer, chosen one at a time.

Effects of single latents do not add up, so each step measures with those already chosen ablated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from saekit import Recording, Replay, SparseAutoencoder, Subject, UsageError, own_forward, own_numerics
from saekit_attribution.effects.logit_difference import frozen, linear_head

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class PromptPair:
    """A flagged prompt, its base prompt, and the start of the base answer, which both should give."""

    prompt: Tokens
    base_prompt: Tokens
    answer: Tokens


def greedy_selection(
    subject: Subject,
    sae: SparseAutoencoder,
    questions: Sequence[PromptPair],
    n: int,
    *,
    shortlist: int = 12,
) -> list[int]:
    """`n` latents in the order in which they were chosen; fewer if no further one helps.

    The cost, averaged over questions, is how much less likely the base answer is after the flagged prompt than after the
    undisturbed base prompt (nats, at least 0), plus how much less likely the ablation makes it after the base prompt
    itself; the second part spares latents that every answer needs. In each step the `shortlist` best latents by
    activation x gradient with the present set ablated are tried, and the best one is chosen.

    Latents are ablated where the SAE was trained. UsageError without questions.
    """
    if not questions:
        raise UsageError("greedy selection: there are no questions with a flagged answer.")
    with subject.lock, frozen(subject.model), frozen(sae), torch.autocast(subject.device.type, enabled=False):
        texts = [(q.prompt, q.answer) for q in questions], [(q.base_prompt, q.answer) for q in questions]
        flagged, base = (_Texts(subject, sae, some) for some in texts)
        undisturbed = base.losses([])
        taken: list[int] = []
        best = _above(flagged.losses([]), undisturbed)
        while len(taken) < n:
            estimate = flagged.estimate(taken, undisturbed) + base.estimate(taken, undisturbed)  # [d_sae]
            estimate[taken] = torch.inf
            chosen = None
            for latent in estimate.argsort(stable=True)[:shortlist].tolist():
                tried = [*taken, latent]
                cost = _above(flagged.losses(tried), undisturbed)
                if cost < best:  # the cost at the base prompts can only add to this
                    cost += _above(base.losses(tried), undisturbed)
                if cost < best:
                    best, chosen = cost, latent
            if chosen is None:
                break
            taken.append(chosen)
    return taken


def _above(losses: Tensor, undisturbed: Tensor) -> float:
    return float((losses - undisturbed).clamp_min(0).mean())


@dataclass
class _Batch:
    """Texts of equal length. numbers: of the texts. recording: of their run. x: [n, T, d]. answers: [n, A].
    rows, positions, latents, values: [E], the active entries, sorted by latent.
    bounds: [d_sae + 1], where each latent's entries begin."""

    numbers: list[int]
    recording: Recording
    x: Tensor
    answers: Tensor
    rows: Tensor
    positions: Tensor
    latents: Tensor
    values: Tensor
    bounds: list[int]


class _Texts:
    """Prompts with answers, run up to the site once; the layers above run again for every set of ablated latents."""

    def __init__(self, subject: Subject, sae: SparseAutoencoder, texts: Sequence[tuple[Tokens, Tokens]]) -> None:
        self._sae, self._head = sae, linear_head(subject.model)
        self._replay = Replay(subject.model, subject.site)
        self._count = len(texts)
        shapes: dict[tuple[int, int], list[int]] = {}
        for number, (prompt, answer) in enumerate(texts):
            shapes.setdefault((len(prompt), len(answer)), []).append(number)
        self._batches = [self._batch(subject, texts, numbers) for _, numbers in sorted(shapes.items())]

    @torch.no_grad()
    def _batch(self, subject: Subject, texts: Sequence[tuple[Tokens, Tokens]], numbers: list[int]) -> _Batch:
        tokens = torch.tensor([[*texts[i][0], *texts[i][1]] for i in numbers], device=subject.device)
        answers = torch.tensor([texts[i][1] for i in numbers], device=subject.device)
        recording = self._replay.record(tokens)
        x = recording.activation.to(torch.promote_types(recording.activation.dtype, self._sae.W_dec.dtype))
        with own_numerics(self._sae, x.device):
            flat, latents, values = self._sae.encode(x.reshape(-1, x.shape[-1]).to(self._sae.W_dec.dtype)).nonzero()
        rows, positions = flat // x.shape[1], flat % x.shape[1]
        kept = self._sae.trained_positions.with_bos(subject.bos_token_id).in_rows(tokens)[rows, positions]
        order = latents[kept].argsort(stable=True)
        rows, positions, latents, values = (t[kept][order] for t in (rows, positions, latents, values))
        counts = torch.bincount(latents, minlength=self._sae.d_sae).cumsum(0).tolist()
        return _Batch(numbers, recording, x, answers, rows, positions, latents, values, [0, *counts])

    @torch.no_grad()
    def losses(self, ablated: Sequence[int]) -> Tensor:
        """The negative log-likelihood of each answer with some latents ablated, in nats: [texts]."""
        found = torch.zeros(self._count, dtype=torch.float64)
        for batch in self._batches:
            found[batch.numbers] = self._loss(batch, self._without(batch, ablated)).double().cpu()
        return found

    @torch.no_grad()
    def estimate(self, ablated: Sequence[int], reference: Tensor) -> Tensor:
        """How much ablating each further latent would raise the mean of max(loss - reference, 0), to first order:
        [d_sae]."""
        total = torch.zeros(self._sae.d_sae, dtype=torch.float64)
        for batch in self._batches:
            with torch.enable_grad():
                leaf = self._without(batch, ablated).detach().requires_grad_(True)
                losses = self._loss(batch, leaf)
                above = losses - reference[batch.numbers].to(losses)
                (gradient,) = torch.autograd.grad(above.clamp_min(0).sum(), leaf)
            for part in torch.arange(len(batch.rows), device=leaf.device).split(1 << 16):
                products = gradient[batch.rows[part], batch.positions[part]] * self._sae.W_dec[batch.latents[part]]
                change = -(batch.values[part] * products.sum(1))
                total.index_add_(0, batch.latents[part].cpu(), change.double().cpu())
        return total / self._count

    def _without(self, batch: _Batch, ablated: Sequence[int]) -> Tensor:
        spans = [torch.arange(batch.bounds[j], batch.bounds[j + 1]) for j in ablated]
        some = torch.cat([*spans, torch.zeros(0, dtype=torch.long)]).to(batch.x.device)
        change = -batch.values[some, None] * self._sae.W_dec[batch.latents[some]]
        return batch.x.index_put((batch.rows[some], batch.positions[some]), change.to(batch.x), accumulate=True)

    def _loss(self, batch: _Batch, activation: Tensor) -> Tensor:
        """The answers' negative log-likelihoods with `activation` [n, T, d] at the site: [n]."""
        length = batch.answers.shape[1]
        logits = self._logits(batch.recording, activation, length + 1)[:, :-1]  # [n, A, vocab]
        return -logits.float().log_softmax(-1).gather(2, batch.answers[..., None]).sum((1, 2))

    def _logits(self, recording: Recording, activation: Tensor, last: int) -> Tensor:
        """The logits of the `last` positions: [n, last, vocab]. A plain linear head runs on these positions alone."""
        head = self._head
        if head is None:
            output = self._replay.run(recording, activation)
            return (output if isinstance(output, Tensor) else output.logits)[:, -last:]
        with own_forward(head, lambda hidden: F.linear(hidden[:, -last:], head.weight, head.bias)):
            output = self._replay.run(recording, activation)
        return output if isinstance(output, Tensor) else output.logits
