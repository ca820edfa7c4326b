"""AUROC, F1, average precision and ECE of several criteria and of their mean, with intervals clustered by dialogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from saekit import Estimate, Interval, UsageError, auroc_interval
from saekit_quality import weighted
from saekit_quality.votes import Floats, constant

FEW_DIALOGUES = 10
_HELD = 1 << 23  # weights held at a time
_OF_LABELS = {
    "auroc": weighted.auroc,
    "average_precision": weighted.average_precision,
    "f1": weighted.f1,
    "ece": weighted.ece,
}
NAMES = tuple(_OF_LABELS)


@dataclass(frozen=True)
class Measured:
    """The metrics of each criterion, by name and then by metric (`NAMES`), and their means over the criteria that have one.

    reasons: why the metrics of a criterion are None.
    """

    criteria: dict[str, dict[str, Estimate]]
    macro: dict[str, Estimate]
    reasons: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """For a JSON file: each value with its interval and n."""
        def told(found: dict[str, Estimate]) -> dict[str, Any]:
            return {name: {"value": estimate.value, **estimate.beside()} for name, estimate in found.items()}

        return {
            "macro": told(self.macro),
            "criteria": {name: told(found) for name, found in self.criteria.items()},
            "not_defined": dict(self.reasons),
        }


def measure(
    probabilities: Floats,
    targets: Floats,
    dialogues: Sequence[str],
    criteria: Sequence[str],
    *,
    resamples: int = 500,
    seed: int = 0,
) -> Measured:
    """All metrics of predictions. probabilities: [n, C] in [0, 1]; targets: [n, C], 0, 1 or NaN (left out).

    F1 is that of "yes" where the probability is at least 0.5. ECE has `weighted.BINS` bins of equal width. The interval of a single
    AUROC is `saekit.auroc_interval`'s; all others come from `resamples` draws of whole dialogues with replacement: their
    percentiles, reflected at the value for ECE, which drawing makes larger (Efron and Tibshirani 1993, section 13.4). A draw that
    lacks a label of a criterion is left out, of the mean too. No interval without resamples. A criterion whose labels are all the
    same has None for all metrics, and the reason.
    """
    _check(probabilities, targets, dialogues, criteria)
    reasons = constant(targets, criteria)
    group = np.unique(np.asarray(dialogues), return_inverse=True)[1]
    columns = [c for c, name in enumerate(criteria) if name not in reasons]
    whole = np.ones((1, len(group)))
    values = np.stack([_each(probabilities[:, c], targets[:, c], whole)[:, 0] for c in columns]) if columns else None
    drawn = _resampled(probabilities, targets, group, columns, resamples, seed)  # [resamples, criteria, metrics]
    few = len(set(group.tolist())) < FEW_DIALOGUES
    note = f"fewer than {FEW_DIALOGUES} dialogues: the interval is too narrow" if few else ""
    found: dict[str, dict[str, Estimate]] = {}
    for name, why in reasons.items():
        found[name] = {metric: Estimate(None, note=why) for metric in NAMES}
    for at, c in enumerate(columns):
        known = ~np.isnan(targets[:, c])
        dialogues_of = len(set(group[known].tolist()))
        n = {"responses": int(known.sum()), "dialogues": dialogues_of, "yes": int(np.nansum(targets[:, c]))}
        for m, name in enumerate(NAMES):
            assert values is not None
            value = float(values[at, m])
            ends = _interval(name, value, drawn[:, at, m])
            if name == "auroc":
                ends = auroc_interval(probabilities[:, c], targets[:, c], group)
            found.setdefault(criteria[c], {})[name] = Estimate(value, ends, n, note)
    macro = {name: Estimate(None, note="no criterion has both labels") for name in NAMES}
    if values is not None:
        n = {"criteria": len(columns), "responses": len(group), "dialogues": len(set(group.tolist()))}
        with np.errstate(invalid="ignore"):
            means = drawn.mean(1)  # a draw that lacks a criterion is NaN, and left out
        tops = dict(zip(NAMES, values.mean(0).tolist(), strict=True))
        for m, (name, top) in enumerate(tops.items()):
            macro[name] = Estimate(top, _interval(name, top, means[:, m]), n, note)
    return Measured({name: found[name] for name in criteria}, macro, reasons)


def macro_auroc(probabilities: Floats, targets: Floats) -> float | None:
    """The mean AUROC over the criteria that have both labels; None without any. For choosing a setting or a step."""
    names = [str(c) for c in range(targets.shape[1])]
    left_out = constant(targets, names)
    weights = np.ones((1, len(targets)))
    there = [c for c, name in enumerate(names) if name not in left_out]
    found = [_known(weighted.auroc, probabilities[:, c], targets[:, c], weights) for c in there]
    return float(np.mean(found)) if found else None


def share_of_ceiling(auroc: float | None, ceiling: float | None) -> float | None:
    """The share of the ceiling's lead over chance: (AUROC - 0.5) / (ceiling - 0.5); None if the ceiling is at chance."""
    if auroc is None or ceiling is None or ceiling <= 0.5:
        return None
    return (auroc - 0.5) / (ceiling - 0.5)


def _known(metric: Any, scores: Floats, labels: Floats, weights: Floats) -> Floats:
    known = ~np.isnan(labels)
    return metric(scores[known], labels[known], weights[:, known])


def _each(scores: Floats, labels: Floats, weights: Floats) -> Floats:
    """[metrics, draws]"""
    return np.stack([_known(metric, scores, labels, weights) for metric in _OF_LABELS.values()])


def _resampled(
    probabilities: Floats, targets: Floats, group: ArrayLike, columns: Sequence[int], resamples: int, seed: int
) -> Floats:
    group = np.asarray(group)
    number, draws = int(group.max()) + 1, np.random.default_rng(seed)
    parts = []
    step = max(1, _HELD // len(group))
    for start in range(0, resamples, step):
        weights = draws.multinomial(number, np.full(number, 1 / number), min(step, resamples - start))[:, group].astype(np.float64)
        if columns:
            parts.append(np.stack([_each(probabilities[:, c], targets[:, c], weights).T for c in columns], 1))
    return np.concatenate(parts) if parts else np.full((0, len(columns), len(NAMES)), np.nan)


def _interval(name: str, value: float, drawn: Floats) -> Interval | None:
    known = drawn[~np.isnan(drawn)]
    if not len(known):
        return None
    low, high = map(float, np.percentile(known, [2.5, 97.5]))
    if name == "ece":
        low, high = (min(1.0, max(0.0, 2 * value - end)) for end in (high, low))
    return Interval(low, high)


def _check(probabilities: Floats, targets: Floats, dialogues: Sequence[str], criteria: Sequence[str]) -> None:
    shape = (len(dialogues), len(criteria))
    if probabilities.shape != shape or targets.shape != shape or not len(dialogues):
        raise UsageError(
            f"measure: {shape[0]} responses and {shape[1]} criteria need as many probabilities and targets, got "
            f"{list(probabilities.shape)} and {list(targets.shape)}."
        )
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise UsageError("measure: probabilities must be 0 to 1, and finite. Put logits through a sigmoid.")
    known = targets[~np.isnan(targets)]
    if not np.isin(known, (0, 1)).all():
        raise UsageError("measure: targets must be 0, 1 or NaN; those of soft votes must be made hard first (`hard_targets`).")
