"""The curves of training as plotly figures: plain dictionaries, so that plotly itself is not imported here."""

from __future__ import annotations

from typing import Any

from saekit.report.rundir import is_number
from saekit.report.words import label

POINTS = 2000
"""More points than a chart has pixels only make the file heavy."""

FIRST = ("explained_variance", "l0", "dead", "grad_norm", "lr", "tokens_per_second")
NOT_DRAWN = {"step", "tokens", "seconds", "loss"}


def loss_figures(history: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The total with what each loss contributes to it, and each loss before its weight."""
    history = thinned(history)
    names = _names(history, "loss/")
    figures: dict[str, dict[str, Any]] = {}
    total = _series(history, "loss")
    weighted = {name: _weighted(history, name) for name in names}
    weighted = {name: ys for name, ys in weighted.items() if any(y is not None for y in ys)}
    if any(y is not None for y in total):
        series = {"total": total} | {f"{name} × weight": ys for name, ys in weighted.items()}
        figures["Total loss" + (", and what each loss contributes" if weighted else "")] = _lines(history, series)
    if names:
        figures["Each loss, before its weight"] = _lines(
            history, {name: _series(history, f"loss/{name}") for name in names}
        )
    changing = {name: _series(history, f"weight/{name}") for name in _names(history, "weight/")}
    changing = {name: ys for name, ys in changing.items() if len({y for y in ys if y is not None}) > 1}
    if changing:
        figures["Weights"] = _lines(history, changing, log=False)
    return figures


def measure_figures(history: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A small chart for every other number that was logged, the well-known ones first."""
    history = thinned(history)
    keys = [key for key in _names(history, "") if key not in NOT_DRAWN and not key.startswith(("loss/", "weight/"))]
    keys.sort(key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))
    return {label(key): _lines(history, {key: _series(history, key)}, log=False, legend=False) for key in keys}


def thinned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most about `POINTS` lines: every k-th, and the last."""
    stride = max(1, -(-len(history) // POINTS))
    kept = history[::stride]
    return kept if not history or kept[-1] is history[-1] else [*kept, history[-1]]


def _names(history: list[dict[str, Any]], prefix: str) -> list[str]:
    """Keys that hold a number on some line, without `prefix`, in the order of their first appearance."""
    names = {key: None for row in history for key, value in row.items() if key.startswith(prefix) and is_number(value)}
    return [key[len(prefix) :] for key in names]


def _series(history: list[dict[str, Any]], key: str) -> list[float | None]:
    """None, a gap in the curve, where there is no finite number."""
    return [row[key] if is_number(row.get(key)) else None for row in history]


def _weighted(history: list[dict[str, Any]], name: str) -> list[float | None]:
    pairs = zip(_series(history, f"loss/{name}"), _series(history, f"weight/{name}"), strict=True)
    return [None if raw is None or weight is None else raw * weight for raw, weight in pairs]


def _lines(
    history: list[dict[str, Any]], series: dict[str, list[float | None]], *, log: bool = True, legend: bool = True
) -> dict[str, Any]:
    steps = [row.get("step") if is_number(row.get("step")) else None for row in history]
    # A logarithm of what may be zero or negative would silently drop points.
    log = log and all(y > 0 for ys in series.values() for y in ys if y is not None)
    few = sum(step is not None for step in steps) < 3
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if few else "lines",
            "x": steps,
            "y": ys,
            "name": _plain(name),
            "line": {"width": 2.4 if name == "total" else 1.6},
        }
        for name, ys in series.items()
    ]
    layout: dict[str, Any] = {
        "height": 340 if legend else 210,
        "showlegend": legend,
        "hovermode": "x unified",
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"type": "log"} if log else {},
    }
    return {"data": data, "layout": layout}


def _plain(name: str) -> str:
    """Plotly reads names as a dialect of HTML; the name of somebody's loss is not markup."""
    return name.replace("&", "&amp;").replace("<", "&lt;")
