"""The metric `ce_recovered`: what the model's predictions lose when the reconstruction takes the activation's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from saekit.activations.batch import TokenBatch
from saekit.activations.subject import Subject
from saekit.runner.context import RunContext


class CERecovered:
    """Cross-entropy recovered by the reconstruction, against zero-ablation and mean-ablation, and the KL divergence.

    ce_recovered = (CE_zero - CE_spliced) / (CE_zero - CE_clean), and ce_recovered_mean with the mean activation in
    place of zero (Bricken et al. 2023; the mean as in Wang et al. 2022). Positions that the SAE was not trained on
    (padding, a first position that is left out) are never replaced. Next tokens are scored at the replaced positions.
    For a transcoder, the activation at the target's site is replaced.
    """

    headline: ClassVar[tuple[str, ...]] = ("ce_recovered",)
    meanings: ClassVar[dict[str, str]] = {
        "ce_recovered": "share won back of the cross-entropy that a zero in the activation's place costs",
        "ce_recovered_mean": "share won back of the cross-entropy that the mean in the activation's place costs",
        "ce_clean": "cross-entropy of the untouched model, in nats a token",
        "ce_zero": "cross-entropy with a zero in the activation's place, in nats a token",
        "ce_mean": "cross-entropy with the mean activation in its place, in nats a token",
        "ce_spliced": "cross-entropy with the reconstruction in the activation's place, in nats a token",
        "kl": "divergence of the model's predictions with the reconstruction in place, in nats a token",
    }

    def __init__(
        self,
        *,
        tokens: Annotated[int, Field(gt=0, description="Held-out positions to score.")] = 20_000,
        rows: Annotated[int, Field(gt=0, description="Rows of tokens in one forward.")] = 16,
        min_cost: Annotated[
            float, Field(ge=0, description="If an ablation costs less than this (nats a token), the share is null.")
        ] = 0.01,
    ) -> None:
        self.tokens, self.rows, self.min_cost = tokens, rows, min_cost

    @torch.no_grad()
    def measure(self, context: RunContext) -> dict[str, float | None]:
        """ce_clean, ce_spliced, ce_zero, ce_mean (nats a token), kl (clean to spliced), ce_recovered, ce_recovered_mean."""
        mean = self._mean(context)
        sums: dict[str, float] = {}
        scored = 0
        for batch in self._batches(context):
            counts, values = self._score(context, batch, mean)
            scored += counts
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
        ce: dict[str, float | None] = {name: value / scored for name, value in sums.items()}
        return {
            **ce,
            "ce_recovered": self._share(ce, "ce_zero", context),
            "ce_recovered_mean": self._share(ce, "ce_mean", context),
        }

    def _share(self, ce: dict[str, Any], ablated: str, context: RunContext) -> float | None:
        cost = ce[ablated] - ce["ce_clean"]
        if cost < self.min_cost:
            context.warn(
                f"CE recovered against {ablated.removeprefix('ce_')}-ablation is not defined: the ablation costs "
                f"{cost:.4f} nats a token, so there is nothing to recover (an untrained model, or a site that is not used)."
            )
            return None
        return (ce[ablated] - ce["ce_spliced"]) / cost

    def _batches(self, context: RunContext) -> Iterator[TokenBatch]:
        left = self.tokens
        for batch in context.source.token_batches("held_out", rows=self.rows):
            yield batch
            left -= int(batch.keep.sum())
            if left <= 0:
                return

    def _mean(self, context: RunContext) -> Tensor:
        """The mean held-out activation at the site that is rebuilt: [d_out]."""
        total, rows = torch.zeros(context.source.d_out, dtype=torch.float64, device=context.device), 0
        for batch in context.held_out_activations(self.tokens):
            target = batch.x if batch.target is None else batch.target
            total, rows = total + target.double().sum(0), rows + len(batch)
        return (total / rows).float()

    def _score(self, context: RunContext, batch: TokenBatch, mean: Tensor) -> tuple[int, dict[str, float]]:
        """(positions scored, sums of cross-entropies and of the KL divergence over them)."""
        subject, sae = context.source.subject, context.sae
        keep = batch.keep.to(context.device)  # [n, T]
        scored = keep[:, :-1] & batch.mask[:, 1:].to(context.device)  # the next token must exist
        targets = batch.tokens[:, 1:].to(context.device)[scored]  # [positions]

        def with_site(replacement: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            def swap(x: Tensor, target: Tensor) -> Tensor:  # [n, T, d_in], [n, T, d_out] -> [n, T, d_out]
                changed = target.clone()
                changed[keep] = replacement(x[keep].float(), target[keep].float()).to(target.dtype)
                return changed

            with subject.spliced(swap):
                return self._log_probabilities(subject, batch, scored)

        clean = self._log_probabilities(subject, batch, scored)  # [positions, vocab]
        spliced = with_site(lambda x, target: sae(x))
        values = {
            "ce_clean": _nll(clean, targets),
            "ce_spliced": _nll(spliced, targets),
            "ce_zero": _nll(with_site(lambda x, target: torch.zeros_like(target)), targets),
            "ce_mean": _nll(with_site(lambda x, target: mean.to(target).expand_as(target)), targets),
            "kl": float((clean.exp() * (clean - spliced)).sum()),
        }
        return int(scored.sum()), values

    @staticmethod
    def _log_probabilities(subject: Subject, batch: TokenBatch, scored: Tensor) -> Tensor:
        return subject.logits(batch)[:, :-1][scored].float().log_softmax(-1)


def _nll(log_probabilities: Tensor, targets: Tensor) -> float:
    return -float(log_probabilities.gather(1, targets[:, None]).double().sum())
