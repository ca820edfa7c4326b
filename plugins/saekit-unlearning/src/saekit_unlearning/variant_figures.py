"""The comparison `unlearning_figures`: the scores, losses and thresholds of all variants of a run, in print and in the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from saekit import ComparisonContext, Result
from saekit_unlearning.edits import PATHS
from saekit_unlearning.print_figures import COLOURS, draw
from saekit_unlearning.variant_table import OURS, SAEBENCH, SCORES, Score, Variant, variant_of, words

POINTS = 500
"""The most points of a curve in the report; the PNG has all."""


def unlearning_figures(
    context: ComparisonContext,
    *,
    unlearn: Annotated[str, Field(description="What the analyzer `unlearn` is called in this run.")] = "unlearn",
    importance: Annotated[str, Field(description="What the callback `importance` is called in this run.")] = "importance",
) -> Result:
    """How well each variant unlearns, how its losses went, and the threshold of importance that it ended with.

    Writes unlearning_scores.png, training_losses.png and feature_thresholds.png; the report has the same to point at, and a table.
    The scores are those that the analyzer `unlearn` gives, on both paths: SAEBench's, of the method that does best by it, and ours,
    of the method that does best on seen wordings. A zero has its reason beside it.
    """
    variants = [variant_of(name, one, unlearn=unlearn, importance=importance) for name, one in context.variants.items()]
    return Result(
        scalars={f"{score}_{v.name}_{path}": found.value for v in variants for (score, path), found in v.scores.items()},
        tables={"variants": [variant.row() for variant in variants]},
        figures={
            **{f"unlearning scores: {SCORES[score]}": _scores(variants, score) for score in SCORES},
            "training losses": _losses(variants),
            "feature thresholds": _thresholds(variants),
        },
        files=draw(variants, context.directory, context.config.training.batch_size),
        notes=_notes(variants),
    )


def _notes(variants: Sequence[Variant]) -> list[str]:
    notes = ["The weighted sum of the losses has other terms in each variant, so their heights do not compare; one term's do."]
    if len(variants) == 1:
        notes.append("The run has no variants, so there is nothing to compare it with.")
    for score in (SAEBENCH, OURS):
        for path in PATHS:
            found = [(v.name, s) for v in variants if (s := v.scores[score, path]).value is not None]
            if found:
                text = f"{SCORES[score]}, {words(path)}: {_in_words(found)}"
                notes.append(text[0].upper() + text[1:])
    return notes


def _in_words(found: Sequence[tuple[str, Score]]) -> str:
    """Which variant is highest, and whether its interval leaves out the others' values."""
    name, best = max(found, key=lambda pair: pair[1].value or 0.0)
    if not best.value:
        return f"all {len(found)} are zero." if len(found) > 1 else "it is zero."
    text = f"{name} is highest with {best.value:.2f}"
    others = [score.value for other, score in found if other != name and score.value is not None]
    if best.low is not None and best.high is not None:
        text += f" ({best.low:.2f} to {best.high:.2f})"
    if others:
        text += f", the next {max(others):.2f}"
        if best.low is not None and max(others) >= best.low:
            text += ", within its interval"
    return text + "."


def _scores(variants: Sequence[Variant], score: str) -> dict[str, Any]:
    bars = []
    for colour, path in zip(COLOURS, PATHS, strict=False):
        found = [variant.scores[score, path] for variant in variants]
        bar = {
            "type": "bar",
            "name": words(path),
            "x": [variant.name for variant in variants],
            "y": [one.value for one in found],
            "text": ["not measured" if one.value is None else f"{one.value:.2f}" for one in found],
            "textposition": "outside",
            "hovertext": [one.reason or one.method for one in found],
            "marker": {"color": colour, "line": {"color": "black", "width": 1}},
        }
        if any(one.low is not None for one in found):
            ends = [(one.value or 0.0, one.low, one.high) for one in found]
            bar["error_y"] = {
                "type": "data",
                "symmetric": False,
                "array": [0.0 if high is None else max(high - value, 0.0) for value, _, high in ends],
                "arrayminus": [0.0 if low is None else max(value - low, 0.0) for value, low, _ in ends],
                "thickness": 1,
            }
        bars.append(bar)
    return _figure(bars, SCORES[score][0].upper() + SCORES[score][1:], "variant", "score (0 to 1)", yaxis={"range": [-0.02, 1.1]})


def _losses(variants: Sequence[Variant]) -> dict[str, Any]:
    lines = []
    for number, variant in enumerate(variants):
        curve = list(variant.losses.get("loss", ()))
        curve = curve[:: -(-len(curve) // POINTS) or 1]
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": variant.name,
                "x": [step for step, _ in curve],
                "y": [value for _, value in curve],
                "opacity": 0.7,
                "line": {"color": COLOURS[number % len(COLOURS)], "width": 2},
            }
        )
    return _figure(lines, "Loss in training, all terms as weighted", "training step", "loss (no unit)")


def _thresholds(variants: Sequence[Variant]) -> dict[str, Any]:
    bar = {
        "type": "bar",
        "x": [variant.name for variant in variants],
        "y": [variant.threshold for variant in variants],
        "text": ["no threshold" if variant.threshold is None else f"{variant.threshold:.3g}" for variant in variants],
        "textposition": "outside",
        "marker": {"color": COLOURS[0]},
    }
    return _figure([bar], "Threshold of importance at the end", "variant", "importance (share of the largest)")


def _figure(data: list[dict[str, Any]], title: str, x: str, y: str, **layout: Any) -> dict[str, Any]:
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}, **layout.pop("yaxis", {})}}
    return {"data": data, "layout": {"title": {"text": title}, **axes, **layout}}
