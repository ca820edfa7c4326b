"""`AnalysedSample`: a sample with its attributions, and the `atp_analysis` that is written for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from saekit_attribution.effects.by_position import PositionScores
from saekit_attribution.effects.fidelity import Fidelity, fidelity
from saekit_attribution.effects.methods import Attribution
from saekit_attribution.labelled_data.teacher_forcing import Sample

EXACT = "exact"


@dataclass(frozen=True)
class AnalysedSample:
    """A sample with its attributions by method, in the order of the option `methods`."""

    sample: Sample
    attributions: dict[str, Attribution]

    def fidelity(self, method: str, recall_at: int) -> Fidelity:
        """The method's fidelity to the exact effects; only the completeness gap if these were not computed, and for
        `exact` itself."""
        estimate = self.attributions[method]
        if EXACT in self.attributions and method != EXACT:
            return fidelity(estimate, self.attributions[EXACT], recall_at)
        return Fidelity(None, None, float(estimate.scores.sum()) + estimate.error - estimate.moved)


def atp_analysis(
    analysed: AnalysedSample, strings: Callable[[Sequence[int]], list[str]], top_k: int, recall_at: int
) -> dict[str, Any]:
    """The entry of a variation in the results file. strings: the texts of tokens.

    The keys at the top belong to the first method; those of the others are under `methods`, by name."""
    first, *others = analysed.attributions
    attribution = analysed.attributions[first]
    sample = analysed.sample
    target, base = strings([sample.target, sample.base])
    return {
        "target_token": target,
        "base_token": base,
        "token_position": sample.token_position,
        "logit_diff": attribution.logit_diff,
        "method": first,
        **_of_method(analysed, first, strings, top_k, recall_at),
        "moved": attribution.moved,
        "methods": {method: _of_method(analysed, method, strings, top_k, recall_at) for method in others},
    }


def _of_method(
    analysed: AnalysedSample, method: str, strings: Callable[[Sequence[int]], list[str]], top_k: int, recall_at: int
) -> dict[str, Any]:
    attribution = analysed.attributions[method]
    order = attribution.scores.abs().argsort(descending=True, stable=True)[:top_k]
    features = [
        {
            "id": str(int(attribution.latents[i])),
            "score": float(attribution.scores[i]),
            "activation": float(attribution.activations[i]),
            "gradient": None if attribution.gradients is None else float(attribution.gradients[i]),
        }
        for i in order.tolist()
    ]
    found = analysed.fidelity(method, recall_at)
    entry = {
        "top_features": features,
        "error_node": attribution.error,
        "fidelity": {
            "spearman": found.spearman,
            "pearson": found.pearson,
            "completeness_gap": found.completeness_gap,
            "recall": None if found.recall is None else found.recall.share,
            "recall_by_chance": None if found.recall is None else found.recall.by_chance,
        },
    }
    if attribution.by_position is not None:
        tokens = strings(analysed.sample.tokens)
        entry["positions"] = [_at_position(place, tokens) for place in attribution.by_position]
    return entry


def _at_position(place: PositionScores, tokens: list[str]) -> dict[str, Any]:
    rows = zip(place.latents, place.scores, place.activations, strict=True)
    return {
        "position": place.position,
        "token": tokens[place.position],
        "top_features": [{"id": str(latent), "score": score, "activation": a} for latent, score, a in rows],
        "error_node": place.error,
    }
