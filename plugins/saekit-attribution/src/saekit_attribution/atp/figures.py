"""The plotly figure of `atp`: each latent's estimated score against its exact effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

POINTS = 4000  # more make the report heavy and the cloud no clearer


def score_against_exact(
    method: str, estimates: Sequence[float], exact: Sequence[float], errors: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """estimates, exact: of each latent in each sample. errors: (estimate, exact effect) of the SAE's error in each sample.

    Of more than 4,000 points a fixed random 4,000 are drawn."""
    drawn = range(len(exact))
    if len(exact) > POINTS:
        order = torch.randperm(len(exact), generator=torch.Generator().manual_seed(0))
        drawn = sorted(order[:POINTS].tolist())  # type: ignore[assignment]
    x, y = [exact[i] for i in drawn], [estimates[i] for i in drawn]
    ends = [min([*x, *y, 0.0]), max([*x, *y, 0.0])]
    hover = "exact %{x:.3g}, estimate %{y:.3g}<extra></extra>"
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "latents",
            "x": x,
            "y": y,
            "marker": {"size": 4, "opacity": 0.4},
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "the SAE's error",
            "x": [b for _, b in errors],
            "y": [a for a, _ in errors],
            "marker": {"size": 7, "symbol": "x"},
        },
    ]
    line = {"type": "scatter", "mode": "lines", "name": "equal", "x": ends, "y": ends, "line": {"dash": "dot"}}
    return {
        "data": [*({**trace, "hovertemplate": hover} for trace in traces), line],
        "layout": {
            "title": {"text": f"{method} against the exact effect"},
            "xaxis": {"title": {"text": "exact effect on the logit difference"}},
            "yaxis": {"title": {"text": f"{method} score"}},
        },
    }
