"""What is kept of each sample: plain JSON from which the attributions come back bit for bit, and its `atp_analysis`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saekit_attribution.effects.fidelity import Fidelity, fidelity
from saekit_attribution.effects.methods import Attribution, Failed, Outcome, Refused
from saekit_attribution.labelled_data.samples import Sample

EXACT = "exact"
TENSORS = ("scores", "activations", "gradients", "weighted")
NUMBERS = ("error", "logit_diff", "moved")


def stored(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON holds it. One that is not finite is a failure: nothing could be ranked by it."""
    if isinstance(outcome, Refused):
        return {"skipped": outcome.reason}
    if isinstance(outcome, Failed):
        return {"error": outcome.error, "details": {"message": outcome.details}}
    for method, attribution in outcome.items():
        numbers = torch.tensor([getattr(attribution, name) for name in NUMBERS], dtype=torch.float64)
        if not all(bool(values.isfinite().all()) for values in (attribution.scores, attribution.activations, numbers)):
            return {"error": "NotFinite", "details": {"message": f"{method} gives scores that are not finite numbers"}}
    return {method: _as_lists(attribution) for method, attribution in outcome.items()}


def _as_lists(attribution: Attribution) -> dict[str, Any]:
    named = {name: getattr(attribution, name) for name in ("latents", *TENSORS, *NUMBERS)}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in named.items()}


def restored(entry: dict[str, Any]) -> dict[str, Attribution]:
    """The attributions, by method, that `stored` was given, their numbers in float64."""
    return {method: _attribution(lists) for method, lists in entry.items()}


def _attribution(lists: dict[str, Any]) -> Attribution:
    tensors = {
        name: None if lists[name] is None else torch.tensor(lists[name], dtype=torch.float64) for name in TENSORS
    }
    latents = torch.tensor(lists["latents"], dtype=torch.int64)
    return Attribution(latents=latents, **tensors, **{name: lists[name] for name in NUMBERS})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Analysed:
    """A sample with its attributions by method, in the order in which the methods were asked for."""

    sample: Sample
    attributions: dict[str, Attribution]

    def fidelity(self, method: str) -> Fidelity:
        """How far the method is from the exact effects; only its completeness gap where these were not computed, and for
        the exact effects themselves."""
        estimate = self.attributions[method]
        if EXACT in self.attributions and method != EXACT:
            return fidelity(estimate, self.attributions[EXACT])
        return Fidelity(None, None, float(estimate.scores.sum()) + estimate.error - estimate.moved)


def atp_analysis(analysed: Analysed, strings: Sequence[str], top_k: int) -> dict[str, Any]:
    """The entry of a variation in the file of results. strings: the target and the base token as text.

    The keys at the top are of the first method; those of the others stand under `methods`, by name."""
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


def _of_method(analysed: Analysed, method: str, top_k: int) -> dict[str, Any]:
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
