"""The plotly figures of `steer`: every direction's effect on the concept, and its damage."""

from __future__ import annotations

from typing import Any

from saekit_steering.effect_curve import EffectCurve

COLOURS = {"latent": "#c0392b", "random": "#7f8c8d", "random covariance": "#8e44ad", "other latent": "#2980b9"}


def effect_figure(curves: dict[tuple[str, int], EffectCurve], kind: str) -> dict[str, Any]:
    """The change of the concept's log-odds on prompts of `kind` against the norm of the added vector."""
    data = [_line(name, curve.norms, curve.effects, first) for name, curve, first in _named(curves)]
    return _figure(
        data, f"The concept's log-odds on {kind} prompts", "norm of the added vector", "change of the log-odds, in nats"
    )


def damage_figure(curves: dict[tuple[str, int], EffectCurve], kind: str) -> dict[str, Any]:
    """The KL divergence on prompts of `kind` against the change of the concept's log-odds elsewhere."""
    data = [_line(name, curve.effects, curve.damages, first) for name, curve, first in _named(curves)]
    return _figure(
        data, f"Damage on {kind} prompts against effect", "change of the concept's log-odds, in nats", "KL, in nats a token"
    )


def _named(curves: dict[tuple[str, int], EffectCurve]) -> list[tuple[str, EffectCurve, bool]]:
    """Each curve with its kind, and whether it is the first of that kind; only the first is in the legend."""
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
