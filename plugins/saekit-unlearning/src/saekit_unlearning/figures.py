"""The figures of `unlearn`: forget against retain, and the scores of all methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saekit_unlearning.experiment import Found

PATH_WORDS = {"spliced": "spliced in", "error_kept": "error kept", None: "no SAE"}


def title(found: Found) -> str:
    """The method and its path, in words."""
    return f"{found.method}, {PATH_WORDS[found.path]}"


def curve_figure(results: Sequence[Found]) -> dict[str, Any]:
    """For each method and path, what it forgets against what it retains, in wordings never used before."""
    dashes = {"spliced": "dot", "error_kept": "solid", None: "dash"}
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": f"{title(found)} (area {found.area:.2f})",
            "line": {"dash": dashes[found.path], "width": 1.5},
            "x": [1.0, *(setting.least_retained for _, setting in found.front)],
            "y": [1.0, *(setting.forget for _, setting in found.front)],
            "text": ["unedited model", *(label for label, _ in found.front)],
            "hovertemplate": "%{text}<br>retained %{x:.3f}, forget %{y:.3f}<extra></extra>",
        }
        for found in results
    ]
    return {
        "data": data,
        "layout": {
            "title": {"text": "What is still known of what was to be forgotten, against what stays (unseen wordings)"},
            "xaxis": {"title": {"text": "still right, group to stay that suffers most"}, "range": [1.02, -0.02]},
            "yaxis": {"title": {"text": "still right, to be forgotten"}, "range": [-0.02, 1.02]},
        },
    }


def score_figure(results: Sequence[Found], ends: Sequence[tuple[float, float] | None]) -> dict[str, Any]:
    """Our score of each method and path with its interval, beside SAEBench's and those of its controls."""
    names, scores = [title(found) for found in results], [found.score for found in results]
    above = [0.0 if end is None else max(end[1] - score, 0.0) for score, end in zip(scores, ends, strict=True)]
    below = [0.0 if end is None else max(score - end[0], 0.0) for score, end in zip(scores, ends, strict=True)]
    controls = [
        (title(found), value) for found in results for against in found.controls.values() for value in against.finite
    ]
    return {
        "data": [
            {
                "type": "bar",
                "name": "ours (unseen wordings)",
                "x": names,
                "y": scores,
                "error_y": {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1},
            },
            {
                "type": "bar",
                "name": "SAEBench's (chosen and reported on the same)",
                "x": names,
                "y": [f.saebench for f in results],
            },
            {
                "type": "scatter",
                "mode": "markers",
                "name": "controls",
                "x": [name for name, _ in controls],
                "y": [value for _, value in controls],
                "marker": {"symbol": "line-ew-open", "size": 14},
            },
        ],
        "layout": {
            "title": {"text": "Unlearning scores"},
            "barmode": "group",
            "yaxis": {"title": {"text": "score"}, "range": [0, 1.02]},
        },
    }
