"""The tables and scalars of `unlearn`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saekit import Interval
from saekit_unlearning.data import FORGET
from saekit_unlearning.experiment import Found
from saekit_unlearning.measure import Outcome
from saekit_unlearning.score import Setting, held_back_score

Ends = tuple[dict[str, Interval], Interval] | None
"""Intervals by group, and of the score; None without an outcome."""


def setting_rows(found: Found) -> list[dict[str, Any]]:
    """Every trial on seen wordings."""
    return [
        {
            "method": found.method,
            "path": found.path or "model",
            "setting": trial.label,
            "latents": len(trial.latents),
            "forget": setting.forget,
            "retain": setting.pooled,
            **shares(setting),
            "chosen": number == found.chosen,
        }
        for number, (trial, setting) in enumerate(zip(found.trials, found.seen, strict=True))
    ]


def method_row(found: Found, ends: Ends) -> dict[str, Any]:
    """What a method did on a path, in wordings never used before."""
    row: dict[str, Any] = {
        "method": found.method,
        "path": found.path or "model",
        "candidates": found.candidates,
        "settings": len(found.trials),
        "saebench_score": found.saebench,
        "score": found.score,
        "score_low": None if ends is None or found.chosen is None else ends[1].low,
        "score_high": None if ends is None or found.chosen is None else ends[1].high,
        "setting": None if found.shown is None else found.trials[found.shown].label,
        "within_bound": found.chosen is not None,
        "area": found.area,
    }
    if found.unseen is not None and ends is not None:
        row |= group_columns(found.unseen, ends[0])
        row["score_of_setting"] = held_back_score(found.unseen.setting)
    if found.alone is not None:
        row |= {
            "forget_unedited_splice": found.alone.setting.forget,
            "score_unedited_splice": held_back_score(found.alone.setting),
        }
    if (nearest := found.nearest_control) is not None:
        row |= {"controls": len(nearest.finite), "controls_mean": nearest.mean, "controls_best": nearest.best}
        row["exceeds_controls"] = all(control.exceeds for control in found.controls.values())
    for kind, damage in found.damage.items():
        row |= {f"kl_{kind}": damage.kl, f"ce_rise_{kind}": damage.ce_rise, f"tokens_{kind}": damage.tokens}
    return row | {"reason_of_zero": found.reason}


def control_rows(found: Found) -> list[dict[str, Any]]:
    """Each kind of control of the setting that is reported, beside that setting's score, within the bound or not."""
    return [
        {
            "method": found.method,
            "path": found.path or "model",
            "control": name,
            "effect": against.effect,
            "controls": len(against.finite),
            "mean": against.mean,
            "best": against.best,
            "exceeds": against.exceeds,
        }
        for name, against in found.controls.items()
    ]


def group_columns(outcome: Outcome, ends: dict[str, Interval]) -> dict[str, Any]:
    """The share still right in each group with its interval and the number of questions."""
    row: dict[str, Any] = {}
    for group, right in outcome.right.items():
        name, asked = column(group), int(outcome.questions[group].sum())
        row |= {name: int(right.sum()) / asked, f"{name}_low": ends[group].low, f"{name}_high": ends[group].high}
        row[f"{name}_n"] = asked
    return row


def shares(setting: Setting) -> dict[str, float]:
    """The share still right in each group to stay."""
    return {column(group): right / asked for group, (right, asked) in setting.retain.items()}


def column(group: str) -> str:
    """A group as the name of a column."""
    return "forget" if group == FORGET else group.replace(", ", "_").replace(" ", "_")


def scalars(results: Sequence[Found], ends: Sequence[Ends]) -> dict[str, float | int | None]:
    """The scores of every method and path, with the interval and the number of questions about what is to be forgotten."""
    found: dict[str, float | int | None] = {}
    for result, end in zip(results, ends, strict=True):
        name = f"{result.method}_{result.path or 'model'}"
        found[f"score_{name}"] = result.score
        if end is not None and result.chosen is not None and result.unseen is not None:
            found |= {f"score_{name}_low": end[1].low, f"score_{name}_high": end[1].high}
            found[f"score_{name}_n"] = int(result.unseen.questions[FORGET].sum())
        found[f"saebench_score_{name}"] = result.saebench
        found[f"area_{name}"] = result.area
    return found
