"""The report's figures: what every direction does to the concept, and at which damage, as plotly figures."""

from __future__ import annotations

from typing import Any

from saekit_steering.effect_curve import Curve

COLOURS = {"latent": "#c0392b", "random": "#7f8c8d", "other latent": "#2980b9"}


def effect_figure(curves: dict[tuple[str, int], Curve], kind: str) -> dict[str, Any]:
    """The change of the concept's log-odds on prompts of `kind` by the norm of what is added."""
    data = [_line(name, curve.norms, curve.effects, first) for name, curve, first in _named(curves)]
    return _figure(
        data, f"The concept's log-odds on {kind} prompts", "norm of what is added", "change of the log-odds, in nats"
    )


def damage_figure(curves: dict[tuple[str, int], Curve], kind: str) -> dict[str, Any]:
    """The KL divergence on prompts of `kind` against the change of the concept's log-odds elsewhere."""
    data = [_line(name, curve.effects, curve.damages, first) for name, curve, first in _named(curves)]
    return _figure(
        data, f"Damage on {kind} prompts by effect", "change of the concept's log-odds, in nats", "KL, in nats a token"
    )


def _named(curves: dict[tuple[str, int], Curve]) -> list[tuple[str, Curve, bool]]:
    """Each curve with its kind, and whether it is the first of it (only that one stands in the legend)."""
    seen: set[str] = set()
    named = []
    for (kind, _), curve in curves.items():
        named.append((kind, curve, kind not in seen))
        seen.add(kind)
    return named


def _line(kind: str, x: list[float], y: list[float], first: bool) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": kind,
        "legendgroup": kind,
        "showlegend": first,
        "line": {"color": COLOURS[kind], "width": 3 if kind == "latent" else 1},
        "x": [0.0, *x],
        "y": [0.0, *y],
        "hovertemplate": "%{x:.3g}: %{y:.3g}<extra></extra>",
    }


def _figure(data: list[dict[str, Any]], title: str, x: str, y: str) -> dict[str, Any]:
    return {
        "data": data[::-1],  # the latent's own line on top
        "layout": {"title": {"text": title}, "xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}},
    }
