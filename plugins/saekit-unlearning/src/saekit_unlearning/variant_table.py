"""What is known of each variant of a run: its scores on both paths, the threshold of importance, its losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saekit import Compared, Result
from saekit_unlearning.edits import PATHS

SAEBENCH, OURS = "saebench", "ours"
SCORES = {SAEBENCH: "SAEBench's score", OURS: "score on unseen wordings"}
"""The two scores, in words: SAEBench's is chosen and reported on the same questions, ours on other wordings."""


@dataclass(frozen=True)
class Score:
    """A score of one variant on one path.

    value: None if nothing was measured. low, high: its 95% interval, if there is one.
    method: by what the latents were selected.
    reason: why the value is zero, or missing; empty otherwise.
    """

    value: float | None
    method: str = ""
    low: float | None = None
    high: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Variant:
    """A variant and what was found of it.

    scores: by score and path.
    threshold: of importance, at the end; None without one. above, living: how many latents reach it, of how many.
    losses: the logged values of each loss, unweighted, by its label; `loss` is the weighted sum. Each as (step, value).
    metrics: on held-out data.
    """

    name: str
    scores: Mapping[tuple[str, str], Score]
    threshold: float | None
    above: float | None
    living: float | None
    losses: Mapping[str, Sequence[tuple[int, float]]]
    metrics: Mapping[str, float | None]

    def row(self) -> dict[str, Any]:
        """A row of the table."""
        row: dict[str, Any] = {"variant": self.name}
        for (score, path), found in self.scores.items():
            row[f"{score}_{path}"] = found.value
            if score == OURS:
                row |= {f"{score}_{path}_low": found.low, f"{score}_{path}_high": found.high, f"method_{path}": found.method}
        row |= {"threshold": self.threshold, "latents_above": self.above, "latents_living": self.living}
        row |= {name: self.metrics.get(name) for name in ("explained_variance", "l0", "dead", "ce_recovered")}
        row["last_loss"] = self.losses["loss"][-1][1] if self.losses.get("loss") else None
        where: dict[str, list[str]] = {}
        for (score, path), found in self.scores.items():
            if found.reason:
                where.setdefault(found.reason, []).append(f"{SCORES[score]}, {words(path)}")
        told = [reason if len(of) == len(self.scores) else f"{'; '.join(of)}: {reason}" for reason, of in where.items()]
        return row | {"reason_of_zero": " ".join(told)}


def words(path: str) -> str:
    """A path in words."""
    return {"spliced": "reconstruction spliced in", "error_kept": "error kept"}.get(path, path)


def variant_of(name: str, one: Compared, *, unlearn: str, importance: str) -> Variant:
    """What is known of a variant. unlearn, importance: what the analyzer and the callback are called in the run."""
    found = one.results.get(importance)
    scalars = found.scalars if found is not None else {}
    return Variant(
        name=name,
        scores=_scores(one, unlearn),
        threshold=scalars.get("threshold"),
        above=scalars.get("above"),
        living=scalars.get("living"),
        losses=_losses(one.history),
        metrics=one.summary["metrics"],
    )


def _scores(one: Compared, unlearn: str) -> dict[tuple[str, str], Score]:
    result = one.results.get(unlearn)
    if result is None:
        failed = one.summary["failed"].get(f"analyzer.{unlearn}")
        missing = Score(None, reason=f"{unlearn} failed: {failed}" if failed else f"There is no result of {unlearn!r}.")
        return {(score, path): missing for score in SCORES for path in PATHS}
    scores = {}
    for path in PATHS:
        # A method that found nothing to edit has no path; its zero is one on every path.
        rows = [row for row in result.tables.get("methods", []) if row.get("path") == path or row.get("candidates") == 0]
        scores[SAEBENCH, path] = _saebench(rows)
        scores[OURS, path] = _ours(rows, result)
    return {(score, path): scores[score, path] for score in SCORES for path in PATHS}


_NOT_TRIED = Score(None, reason="No edit on this path was tried.")


def _saebench(rows: list[dict[str, Any]]) -> Score:
    """The highest, which is what SAEBench reports."""
    if not rows:
        return _NOT_TRIED
    best = max(rows, key=lambda row: row["saebench_score"])
    reason = best.get("reason_of_zero") or "" if not best["saebench_score"] else ""
    return Score(best["saebench_score"], str(best["method"]), reason=reason)


def _ours(rows: list[dict[str, Any]], result: Result) -> Score:
    """That of the method that the analyzer puts forward, which it chose on the seen wordings."""
    if not rows:
        return _NOT_TRIED
    named = (row for row in rows if f"score_{row['method']}_{row['path']}" in result.headline)
    row = next(named, None) or max(rows, key=lambda row: row["saebench_score"])
    reason = ""
    if not row["score"]:
        reason = row.get("reason_of_zero") or (
            "The setting that was chosen on seen wordings left everything known in unseen ones."
            if row.get("within_bound", True)
            else "No setting kept enough of every group in seen wordings, so none was chosen."
        )
    return Score(row["score"], str(row["method"]), row.get("score_low"), row.get("score_high"), reason)


def _losses(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in history:
        for key, value in line.items():
            if (key == "loss" or key.startswith("loss/")) and isinstance(value, int | float):
                curves.setdefault(key.removeprefix("loss/"), []).append((int(line["step"]) + 1, float(value)))
    return curves
