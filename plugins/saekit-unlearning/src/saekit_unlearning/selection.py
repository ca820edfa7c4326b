"""Which latents to edit: by how often they are active on the texts, by attribution, or greedily."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from saekit import Code
from saekit_unlearning.answers import log_likelihoods
from saekit_unlearning.edits import Ablate, LatentEdit
from saekit_unlearning.methods import Seen
from saekit_unlearning.passages import Passages

_AT_ONCE = 1 << 14  # active latents whose decoder rows are gathered at a time


def by_sparsity(forget: Tensor, retain: Tensor, threshold: float) -> list[int]:
    """SAEBench's rule (Karvonen et al. 2025, section on unlearning, after Farrell, Lau and Conmy 2024): the latents whose rate on
    retain text is below `threshold`, the most active on forget text first. Those that never fire there are left out.

    forget, retain: [d_sae], the rates."""
    rate = torch.where(retain < threshold, forget, 0.0)
    return rate.argsort(descending=True, stable=True)[: int((rate > 0).sum())].tolist()


def by_attribution(seen: Seen, without: Sequence[int] = ()) -> list[int]:
    """Latents by what ablating them would take from right answers about what is to be forgotten, and not from others.

    For a question let m be the log-likelihood of the right answer less the mean of the others'. To first order, ablating
    latent j lowers it by A_j = sum over positions t of a_j(t) W_dec[j] . dm/dx(t) (Syed, Rager and Conmy 2023, "attribution
    patching"). Latents are sorted by mean A_j over the forget questions less its mean over the others where that is positive,
    and only those for which this is positive are candidates.

    without: latents that are ablated already, with the error kept. They are left out."""
    forget, retain = _attributions(seen, without)
    score = forget - retain.clamp_min(0)
    score[list(without)] = 0
    return score.argsort(descending=True, stable=True)[: int((score > 0).sum())].tolist()


def greedily(seen: Seen, numbers: Sequence[int]) -> list[int]:
    """The first latents by attribution, up to the first of `numbers`; then those that come first once these are ablated, up to
    the second; and so on. Fewer than asked for if none is left that helps."""
    chosen: list[int] = []
    for number in sorted(numbers):
        chosen += by_attribution(seen, chosen)[: number - len(chosen)]
    return chosen


def _attributions(seen: Seen, without: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A_j, averaged over the questions about what is to be forgotten, and over the others: [d_sae] each."""
    edit = LatentEdit(seen.sae, torch.tensor(list(without), dtype=torch.long), Ablate(), "error_kept", seen.codes)
    forgets = torch.tensor([seen.forgets(question) for question in seen.questions])
    found = torch.zeros(2, seen.sae.d_sae, device=seen.sae.W_dec.device)
    for passages, rows in seen.examination.batches():
        with torch.enable_grad():
            activation = edit(passages).detach().requires_grad_()
            logits = seen.site.logits(passages, partial(_given, activation))
            margins = [
                (
                    _weights(seen, row.question, [number for number, _ in row.candidates]).to(logits)
                    * log_likelihoods(own, row)
                ).sum()
                for own, row in zip(logits, rows, strict=True)
            ]
            (gradient,) = torch.autograd.grad(torch.stack(margins).sum(), activation)
        kind = (~forgets[[row.question for row in rows]]).long().to(gradient.device)  # [n], 0 for forget, 1 for retain
        kind = kind[:, None].expand_as(passages.keep)[passages.keep]  # [m]
        _add(found, seen.codes(passages), gradient[passages.keep].to(seen.sae.W_dec), kind, seen.sae.W_dec.detach())
    counts = torch.stack([forgets.sum(), (~forgets).sum()]).clamp_min(1).to(found)
    forget, retain = found / counts[:, None]
    return forget, retain


def _given(activation: Tensor, _: Passages) -> Tensor:
    """An activation as an edit of the site."""
    return activation


def _weights(seen: Seen, question: int, candidates: list[int]) -> Tensor:
    """The weights with which the candidates' log-likelihoods make up m: 1 for the right one, the others' sum to -1."""
    asked = seen.questions[question]
    other = -1 / (len(asked.candidates) - 1)
    return torch.tensor([1.0 if number == asked.answer else other for number in candidates])


def _add(found: Tensor, code: Code, gradient: Tensor, kind: Tensor, rows: Tensor) -> None:
    """Add a_j W_dec[j] . gradient of every active latent to found [2, d_sae]; gradient [m, d], kind [m]."""
    at, latents, values = code.nonzero()
    for part in torch.arange(len(at), device=at.device).split(_AT_ONCE):
        effect = values[part] * (gradient[at[part]] * rows[latents[part]]).sum(1)
        found.view(-1).index_add_(0, kind[at[part]] * found.shape[1] + latents[part], effect.to(found))
