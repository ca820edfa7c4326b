"""The curves of training as plotly figures: plain dictionaries, so that plotly is not imported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from saekit.wording import is_constant, is_number, label

POINTS = 2000
"""More points than pixels would only make the file larger."""

FIRST = ("explained_variance", "l0", "dead", "grad_norm", "lr", "tokens_per_second")
NOT_DRAWN = {"step", "tokens", "seconds", "loss"}


def loss_figures(history: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The total with the contribution of each loss, and each loss before its weight."""
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
    """A small chart of every other logged number, well-known ones first."""
    history = thinned(history)
    keys = [key for key in _names(history, "") if key not in NOT_DRAWN and not key.startswith(("loss/", "weight/"))]
    keys.sort(key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))
    return {label(key): _lines(history, {key: _series(history, key)}, log=False, legend=False) for key in keys}


def logged_names(history: list[dict[str, Any]]) -> list[str]:
    """Everything logged that can be drawn: the total, the losses, the well-known measures, the rest."""
    keys = [key for key in _names(history, "") if key not in NOT_DRAWN and not key.startswith("weight/")]
    rank = {name: place for place, name in enumerate(FIRST)}
    keys.sort(key=lambda key: -1 if key.startswith("loss/") else rank.get(key, len(rank)))
    return (["loss"] if any(is_number(row.get("loss")) for row in history) else []) + keys


def overlaid(
    histories: dict[str, list[dict[str, Any]]], names: list[str], *, legend: bool = True
) -> dict[str, dict[str, Any]]:
    """A chart for each name with a line for each run, which has the same colour in all charts.

    The x axis is activations trained on if every line has them, since steps of different batch sizes do not compare."""
    histories = {run: thinned(history) for run, history in histories.items()}
    by_tokens = all(is_number(row.get("tokens")) for history in histories.values() for row in history)
    return {name: _overlaid(histories, name, "tokens" if by_tokens else "step", legend) for name in names}


def _overlaid(histories: dict[str, list[dict[str, Any]]], name: str, over: str, legend: bool) -> dict[str, Any]:
    # A run without this series keeps its place, so that the others keep their colours.
    lines = {run: history if name in _names(history, "") else [] for run, history in histories.items()}
    wants_log = name.startswith("loss")
    figures = [
        _lines(history, {run: _series(history, name)}, log=wants_log, legend=legend) for run, history in lines.items()
    ]
    data = [trace for figure in figures for trace in figure["data"]]
    for trace, history in zip(data, lines.values(), strict=True):
        trace["x"] = [row[over] if is_number(row.get(over)) else None for row in history]
        trace["showlegend"] = bool(history)
    layout = figures[0]["layout"]
    layout["xaxis"] = {"title": {"text": "activations trained on" if over == "tokens" else over}}
    layout["yaxis"] = _y_axis([y for trace in data for y in trace["y"]], log=wants_log)
    return {"data": data, "layout": layout}


def bars(values: dict[str, dict[str, Any]], columns: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A bar chart of each column in which at least two runs have a number. values: each run's values by name."""
    figures = {}
    for column in columns:
        found = {run: own[column] for run, own in values.items() if is_number(own.get(column))}
        if len(found) > 1:
            data = [{"type": "bar", "x": [_plain(run) for run in found], "y": list(found.values())}]
            figures[column] = {"data": data, "layout": {"height": 210, "showlegend": False}}
    return figures


def thinned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most about `POINTS` lines: every k-th and the last."""
    stride = max(1, -(-len(history) // POINTS))
    kept = history[::stride]
    return kept if not history or kept[-1] is history[-1] else [*kept, history[-1]]


def _names(history: list[dict[str, Any]], prefix: str) -> list[str]:
    """Keys with a number on some line, without `prefix`, in the order of their first appearance."""
    names = {key: None for row in history for key, value in row.items() if key.startswith(prefix) and is_number(value)}
    return [key[len(prefix) :] for key in names]


def _series(history: list[dict[str, Any]], key: str) -> list[float | None]:
    """The values, with None (a gap in the curve) for what is not a finite number."""
    return [row[key] if is_number(row.get(key)) else None for row in history]


def _weighted(history: list[dict[str, Any]], name: str) -> list[float | None]:
    pairs = zip(_series(history, f"loss/{name}"), _series(history, f"weight/{name}"), strict=True)
    return [None if raw is None or weight is None else raw * weight for raw, weight in pairs]


def _lines(
    history: list[dict[str, Any]], series: dict[str, list[float | None]], *, log: bool = True, legend: bool = True
) -> dict[str, Any]:
    steps = [row.get("step") if is_number(row.get("step")) else None for row in history]
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
        "yaxis": _y_axis([y for ys in series.values() for y in ys], log=log),
    }
    return {"data": data, "layout": layout}


def _y_axis(values: Sequence[float | None], *, log: bool) -> dict[str, Any]:
    """Plotly's own axis, logarithmic if asked for and possible. Around a constant plotly would draw an axis of any length with the
    line in its middle: then the axis runs from zero to a little beyond it, so that its height says how large it is."""
    known = [y for y in values if y is not None]
    if known and is_constant(known):
        return {"range": sorted((0.0, 1.2 * known[0] or 1.0))}
    # A logarithmic axis would silently drop points that are zero or negative.
    return {"type": "log"} if log and all(y > 0 for y in known) else {}


def _plain(name: str) -> str:
    """Plotly reads names as a kind of HTML; the name of a loss is not markup."""
    return name.replace("&", "&amp;").replace("<", "&lt;")
