"""Whether probabilities are what they say: temperature scaling, and the reliability plot. ECE is `weighted.ece`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saekit import wilson_interval
from saekit_quality.votes import Floats, constant
from saekit_quality.weighted import BINS, bin_of, ece

COLDEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True)
class Temperatures:
    """What logits are divided by. values: [C]. notes: by criterion, why its temperature says little."""

    values: Floats
    notes: dict[str, str]

    def probabilities(self, logits: Floats) -> Floats:
        """sigmoid(logits / T): [n, C]. The order of the responses in each criterion, and so its AUROC, stay."""
        return sigmoid(logits / self.values)


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    from scipy.special import expit  # slow to import

    return expit(np.asarray(logits, dtype=np.float64))


def fit_temperatures(logits: Floats, targets: Floats, criteria: Sequence[str], *, one: bool = False) -> Temperatures:
    """The temperatures with the lowest cross-entropy (Guo et al. 2017), to be fitted on validation responses: [n, C] each.

    targets: 0 to 1, so that shares of votes will do too, or NaN. one: a single temperature for all criteria. A criterion without
    both labels keeps 1. The search is over 0.05 to 20, and an answer at an end has a note.
    """
    values, notes = np.ones(len(criteria)), {}
    if one:
        values[:] = _fitted(logits.ravel(), targets.ravel())
        return Temperatures(values, _at_end(values[:1], ["all"]))
    without = constant(targets, criteria)
    for c, name in enumerate(criteria):
        if name in without:
            notes[name] = f"not fitted: {without[name]}"
        else:
            values[c] = _fitted(logits[:, c], targets[:, c])
    return Temperatures(values, {**notes, **_at_end(values, criteria)})


def reliability(probabilities: Floats, targets: Floats) -> list[dict[str, Any]]:
    """Of each bin that is not empty: the mean probability, the share of yes with its interval, and n. Both [n], 0, 1 or NaN."""
    known = ~np.isnan(targets)
    probabilities, targets = probabilities[known], targets[known]
    bins, rows = bin_of(probabilities), []
    for b in np.unique(bins):
        inside = bins == b
        low, high = wilson_interval(round(float(targets[inside].sum())), int(inside.sum()))
        rows.append({
            "from": float(b / BINS), "to": float((b + 1) / BINS), "n": int(inside.sum()),
            "probability": float(probabilities[inside].mean()), "share": float(targets[inside].mean()), "low": low, "high": high,
        })  # fmt: skip
    return rows


def reliability_figure(predictions: dict[str, Floats], targets: Floats, title: str = "All criteria") -> dict[str, Any]:
    """A plotly figure: shares of yes against probabilities, for several named predictions [n] or [n, C] of the targets.

    Its intervals take responses for independent (Wilson), so they are a little narrow where dialogues have several.
    """
    traces: list[dict[str, Any]] = [{
        "type": "scatter", "mode": "lines", "name": "perfect", "x": [0, 1], "y": [0, 1], "hoverinfo": "skip",
        "line": {"dash": "dot", "color": "grey", "width": 1},
    }]  # fmt: skip
    for name, given in predictions.items():
        scores, labels = given.ravel(), targets.ravel()
        rows, known = reliability(scores, labels), ~np.isnan(labels)
        off = float(ece(scores[known], labels[known], np.ones((1, int(known.sum()))))[0]) if known.any() else float("nan")
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": f"{name} (ECE {off:.3f})",
            "x": [row["probability"] for row in rows], "y": [row["share"] for row in rows],
            "error_y": {
                "type": "data", "symmetric": False, "thickness": 1,
                "array": [row["high"] - row["share"] for row in rows], "arrayminus": [row["share"] - row["low"] for row in rows],
            },
            "text": [f"n {row['n']}" for row in rows],
        })  # fmt: skip
    axis = {"range": [-0.02, 1.02]}
    return {
        "data": traces,
        "layout": {
            "title": {"text": f"{title}: how often it was yes, by the probability given"},
            "xaxis": {"title": {"text": "probability of yes"}, **axis},
            "yaxis": {"title": {"text": "share of yes"}, **axis},
        },
    }


def _fitted(logits: Floats, targets: Floats) -> float:
    from scipy.optimize import minimize_scalar

    known = ~np.isnan(targets)
    x, t = logits[known].astype(np.float64), targets[known]
    if not len(x):
        return 1.0

    def cross_entropy(log_temperature: float) -> float:
        scaled = x / np.exp(log_temperature)
        return float((np.logaddexp(0, scaled) - t * scaled).mean())

    found = minimize_scalar(cross_entropy, bounds=(np.log(COLDEST), np.log(HOTTEST)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def _at_end(values: Floats, criteria: Sequence[str]) -> dict[str, str]:
    return {
        name: f"the search ended at {value:.3g}, the end of its range: logits and labels hardly go together, or perfectly"
        for name, value in zip(criteria, values, strict=True)
        if value < COLDEST * 1.01 or value > HOTTEST * 0.99
    }
