"""The plotly figure of `ablate`: the shares of answers against the number of ablated latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def curve_figure(template_type: str, rows: Sequence[dict[str, Any]], before: float) -> dict[str, Any]:
    """rows: those of the table `curve` for one template type. before: the rate without ablation."""
    data = []
    for ranking in dict.fromkeys(row["ranking"] for row in rows):
        some = [row for row in rows if row["ranking"] == ranking]
        for name, dash in (("rate", "solid"), ("neutral", "dot")):
            start = before if name == "rate" else None
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"{ranking}, {'follows the preference' if name == 'rate' else 'base answer'}",
                    "legendgroup": ranking,
                    "line": {"dash": dash},
                    "x": [0, *(row["latents"] for row in some)],
                    "y": [start, *(row[name] for row in some)],
                    "hovertemplate": "%{x} latents: %{y:.2f}<extra></extra>",
                }
            )
    return {
        "data": data,
        "layout": {
            "title": {"text": f"Answers to '{template_type}' by the number of ablated latents"},
            "xaxis": {"title": {"text": "ablated latents"}},
            "yaxis": {"title": {"text": "share of answers"}, "range": [-0.02, 1.02]},
        },
    }
