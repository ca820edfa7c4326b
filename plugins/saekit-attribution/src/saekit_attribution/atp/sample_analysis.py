"""`AnalysedSample`: a sample with its attributions, and the `atp_analysis` that is written for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saekit_attribution.effects.fidelity import Fidelity, fidelity
from saekit_attribution.effects.methods import Attribution
from saekit_attribution.labelled_data.teacher_forcing import Sample

EXACT = "exact"


@dataclass(frozen=True)
class AnalysedSample:
    """A sample with its attributions by method, in the order of the option `methods`."""

    sample: Sample
    attributions: dict[str, Attribution]

    def fidelity(self, method: str) -> Fidelity:
        """The method's fidelity to the exact effects; only the completeness gap if these were not computed, and for
        `exact` itself."""
        estimate = self.attributions[method]
        if EXACT in self.attributions and method != EXACT:
            return fidelity(estimate, self.attributions[EXACT])
        return Fidelity(None, None, float(estimate.scores.sum()) + estimate.error - estimate.moved)


def atp_analysis(analysed: AnalysedSample, strings: Sequence[str], top_k: int) -> dict[str, Any]:
    """The entry of a variation in the results file. strings: the target and the base token as text.

    The keys at the top belong to the first method; those of the others are under `methods`, by name."""
    first, *others = analysed.attributions
    attribution = analysed.attributions[first]
    return {
        "target_token": strings[0],
        "base_token": strings[1],
        "token_position": analysed.sample.token_position,
        "logit_diff": attribution.logit_diff,
        "method": first,
        **_of_method(analysed, first, top_k),
        "moved": attribution.moved,
        "methods": {method: _of_method(analysed, method, top_k) for method in others},
    }


def _of_method(analysed: AnalysedSample, method: str, top_k: int) -> dict[str, Any]:
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
    found = analysed.fidelity(method)
    return {
        "top_features": features,
        "error_node": attribution.error,
        "fidelity": {
            "spearman": found.spearman,
            "pearson": found.pearson,
            "completeness_gap": found.completeness_gap,
        },
    }
