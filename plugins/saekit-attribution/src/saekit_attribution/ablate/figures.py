"""The plotly figure of `ablate`: the shares of answers against the number of ablated latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saekit_attribution.ablate.shares import Share


def curve_figure(template_type: str, behaviour: str, rows: Sequence[dict[str, Any]], before: Share) -> dict[str, Any]:
    """rows: those of the table `curve` for one template type. before: the rate without ablation."""
    data = []
    names = {"rate": (behaviour, "solid"), "neutral": ("base answer", "dot")}
    for ranking in dict.fromkeys(row["ranking"] for row in rows):
        some = [row for row in rows if row["ranking"] == ranking]
        for column, (name, dash) in names.items():
            start = before.numbers(column) if column == "rate" else dict.fromkeys(_with_ends(column))
            y, low, high = ([start[key], *(row[key] for row in some)] for key in _with_ends(column))
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"{ranking}, {name}",
                    "legendgroup": ranking,
                    "line": {"dash": dash},
                    "x": [0, *(row["latents"] for row in some)],
                    "y": y,
                    "error_y": {
                        "type": "data",
                        "symmetric": False,
                        "array": _distance(y, high),
                        "arrayminus": _distance(low, y),
                        "thickness": 1,
                    },
                    "hovertemplate": "%{x} latents: %{y:.2f}<extra></extra>",
                }
            )
    return {
        "data": data,
        "layout": {
            "title": {"text": f"Answers to '{template_type}' by the number of ablated latents"},
            "xaxis": {"title": {"text": "ablated latents"}},
            "yaxis": {"title": {"text": "share of answers, with its interval"}, "range": [-0.02, 1.02]},
        },
    }


def _with_ends(column: str) -> tuple[str, str, str]:
    return column, f"{column}_low", f"{column}_high"


def _distance(low: Sequence[float | None], high: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else b - a for a, b in zip(low, high, strict=True)]
