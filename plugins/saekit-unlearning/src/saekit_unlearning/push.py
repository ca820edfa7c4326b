"""Decoder rows that push the activation away from what is known, trained by the two divergences with all else frozen.

    minimise over rows R:  mean forget_kl(model(x + a R), q) + weight * mean retain_kl(model(x), model(x + a R))

by Adam, with a row that all latents share added to each one's own, which learns from every text what works for all. a [m, n] are
the latents' activations at the site, which do not change, and a mean over the positions that count. On
retain text in which no latent fires the second term is exactly zero, so only the rest of it is run.

q is uniform, or what the model itself says of the others: the mean of its predictions over all forget texts that differ only in
name and answer. That needs no oracle, and no row has to undo what the wording alone tells of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from saekit import TokenBatch, UsageError
from saekit_unlearning.data import Text
from saekit_unlearning.edits import Parts
from saekit_unlearning.kl import forget_kl, retain_kl
from saekit_unlearning.passages import Passages, Site
from saekit_unlearning.places import Batch, batches, placed

Target = Literal["uniform", "others", "oracle"]


@dataclass(frozen=True)
class Pushed:
    """Trained rows [n, d], and the two divergences at every step: [steps]."""

    rows: Tensor
    forget: np.ndarray
    retain: np.ndarray


@dataclass(frozen=True)
class _Ready:
    """Some passages with what does not change while rows are trained. predicting: [n, T], which positions count.
    unknowing: [k, vocab] log probabilities at them; None for uniform ones."""

    passages: Passages
    base: Tensor
    active: Tensor
    predicting: Tensor
    unknowing: Tensor | None = None

    def logits(self, site: Site, rows: Tensor) -> Tensor:
        """[k, vocab], at the positions that count."""
        x = self.passages.with_x(self.base + (self.active @ rows).to(self.base))
        return site.logits(self.passages, lambda _: x)[self.predicting].float()


def train_rows(
    site: Site,
    parts: Parts,
    forget: Sequence[Text],
    retain: Sequence[Sequence[int]],
    *,
    target: Target = "uniform",
    oracle: Callable[[TokenBatch], Tensor] | None = None,
    steps: int = 300,
    lr: float = 0.3,
    batch: int = 64,
    retain_rows: int = 8,
    weight: float = 10.0,
    seed: int = 0,
) -> Pushed:
    """Train the rows of the latents whose activations `parts` gives.

    retain: rows of tokens. oracle: logits of a model that does not know, for the target of that name.
    lr: of Adam, falling linearly to 0: about how far a latent's push at its mean activation moves in a step, in RMS norms of the
        activation. Rows that grow fast early saturate the layer norm above them, and end in a worse minimum.
    batch, retain_rows: texts, and rows of tokens, in one step. UsageError if no latent fires on any forget text."""
    draws = np.random.default_rng(seed)
    texts = [placed(site.subject.tokenizer, text) for text in forget]
    # Texts of one length make a step cheap; that of each step is drawn.
    texts = sorted((texts[i] for i in draws.permutation(len(texts))), key=lambda text: len(text.tokens))
    recorded = batches(site, texts, batch)
    with torch.no_grad():
        wanted = [_predicting(one, target) for one in recorded]
        targets = _targets(site, recorded, wanted, target, oracle)
        ready = [
            _Ready(one.passages, *parts(one.passages), predicting, unknowing)
            for one, predicting, unknowing in zip(recorded, wanted, targets, strict=True)
        ]
        kept = _where_fired(site, parts, retain, retain_rows, draws)
    n = ready[0].active.shape[1]
    total = sum((one.active.sum(0) for one in ready), torch.zeros(n, device=site.subject.device))
    times = sum(((one.active > 0).sum(0) for one in ready), torch.zeros(n, device=site.subject.device))
    if not bool(times.any()):
        raise UsageError("none of the latents fires on any forget text, so no row could push anything.")
    norm = torch.cat([one.base for one in ready]).float().square().mean().sqrt()  # of a coordinate
    unit = (norm * times.clamp_min(1) / total.clamp_min(torch.finfo(total.dtype).tiny))[:, None]  # [n, 1]
    unit[times == 0] = 0.0  # a latent that never fires has no row to train
    own = torch.zeros(n, ready[0].base.shape[1], device=unit.device, requires_grad=True)
    common = torch.zeros(ready[0].base.shape[1], device=unit.device, requires_grad=True)
    optimizer = torch.optim.Adam([own, common], lr=lr)
    forgotten, retained = torch.zeros(steps, device=unit.device), torch.zeros(steps, device=unit.device)
    order: list[int] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        order = order or draws.permutation(len(ready)).tolist()
        one = ready[order.pop()]
        rows = (own + common) * unit
        loss = forget_kl(one.logits(site, rows), one.unknowing).mean()
        forgotten[step] = loss.detach()
        if kept:
            other = kept[draws.integers(len(kept))]
            with torch.no_grad():
                base = other.logits(site, torch.zeros_like(rows))
            divergence = retain_kl(base, other.logits(site, rows)).mean()
            retained[step] = divergence.detach()
            loss = loss + weight * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Pushed(((own + common) * unit).detach(), forgotten.cpu().numpy(), retained.cpu().numpy())


def random_rows(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Random directions [n, d], each as long as its row: what any push of this size does. generator: on the CPU."""
    draws = torch.randn(rows.shape, generator=generator).to(rows)
    return draws / draws.norm(dim=1, keepdim=True) * rows.norm(dim=1, keepdim=True)


def _predicting(batch: Batch, target: Target) -> Tensor:
    """The positions whose prediction counts: [n, T]. What comes after the answer's first token depends on the answer, which the
    texts that are averaged do not share."""
    if target != "others":
        return batch.predicting
    first = batch.predicting.long().argmax(1, keepdim=True)  # [n, 1]
    return torch.zeros_like(batch.predicting).scatter(1, first, True)


def _targets(
    site: Site,
    recorded: Sequence[Batch],
    wanted: Sequence[Tensor],
    target: Target,
    oracle: Callable[[TokenBatch], Tensor] | None,
) -> list[Tensor | None]:
    """For each batch the log probabilities [k, vocab] of a model that does not know; None for uniform ones."""
    if target == "uniform":
        return [None] * len(recorded)
    if target == "oracle":
        if oracle is None:
            raise ValueError("the target 'oracle' needs the logits of one")
        return [
            oracle(TokenBatch(p.tokens, p.mask, p.keep, p.rows))[at].float().log_softmax(-1)
            for p, at in ((one.passages, at) for one, at in zip(recorded, wanted, strict=True))
        ]
    said = [site.logits(one.passages)[at].float().softmax(-1) for one, at in zip(recorded, wanted, strict=True)]
    wordings = [[_wording(text) for text in one.texts] for one in recorded]
    sums: dict[str, Tensor] = {}
    for names, probabilities in zip(wordings, said, strict=True):
        for name, each in zip(names, probabilities, strict=True):
            sums[name] = sums.get(name, torch.zeros_like(each)) + each
    return [torch.stack([(sums[name] / sums[name].sum()).log() for name in names]) for names in wordings]


def _wording(text: Text) -> str:
    """What texts that differ only in name and answer share."""
    (start, end), answer = text.name, text.answer[0]
    return "\0".join((text.text[:start], text.text[end:answer])) if end <= answer else text.text[:start]


def _where_fired(
    site: Site, parts: Parts, retain: Sequence[Sequence[int]], size: int, draws: np.random.Generator
) -> list[_Ready]:
    """The rows of `retain` in which a latent fires, `size` at a time in random order."""
    fired = list[int]()
    for passages in site.passages(retain):
        here = torch.zeros_like(passages.keep).masked_scatter(passages.keep, parts(passages)[1].any(1)).any(1)  # [n]
        fired += passages.rows[here].tolist()
    fired = [fired[i] for i in draws.permutation(len(fired))]
    found = []
    for start in range(0, len(fired), size):
        rows = [retain[i] for i in fired[start : start + size]]
        (passages,) = site.passages(rows, batch_tokens=max(map(len, rows)) * len(rows))
        found.append(_Ready(passages, *parts(passages), passages.mask))
    return found
