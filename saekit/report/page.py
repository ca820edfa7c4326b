"""From the files of a run to what the template shows: plain data, which the template escapes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from saekit.report.curves import POINTS, logged_names, loss_figures, measure_figures, overlaid
from saekit.report.latents import Latent, by_latent, of_rows
from saekit.run_directory import RunFiles
from saekit.wording import (
    NOT_DEFINED,
    count,
    duration,
    held_out_amounts,
    interval,
    is_number,
    label,
    memory,
    number,
    with_intervals,
)

TABLE_ROWS = 2000
"""How much of a long table the page shows. The page says that all of it is in result.json."""


@dataclass
class Cell:
    """A table's cell; `sort` is the number to sort by, if it has one."""

    text: str
    sort: float | None = None


@dataclass
class Table:
    """A table as shown; `note` says what is left out."""

    name: str
    columns: list[str]
    numeric: list[bool]
    rows: list[list[Cell]]
    note: str = ""


@dataclass
class Figure:
    """A plotly figure; `spec` goes into the page as JSON."""

    id: str
    name: str
    spec: dict[str, Any]


@dataclass
class Analysis:
    """What one analyzer found."""

    id: str
    name: str
    notes: list[str]
    scalars: list[tuple[str, str, bool]]
    figures: list[Figure]
    tables: list[Table]
    latents: list[Latent]
    latents_note: str
    files: list[tuple[str, str | None]]


def page(run: RunFiles) -> dict[str, Any]:
    """Everything that the template uses."""
    summary = run.summary
    sae = _dict(summary.get("sae"))
    metrics = _dict(summary.get("metrics"))
    meanings = {name: str(meaning) for name, meaning in _dict(summary.get("meanings")).items()}
    headline = [name for name in _list(summary.get("headline")) if name in metrics] or list(metrics)[:6]
    analyses = [_analysis(position, name, result, run) for position, (name, result) in enumerate(run.analyses.items())]
    told = _dict(summary.get("analysis"))
    # An analyzer with nothing but its scalars in the summary is shown too.
    analyses += [
        _analysis(position, name, {"scalars": _dict(scalars)}, run)
        for position, (name, scalars) in enumerate(told.items(), start=len(analyses))
        if name not in run.analyses
    ]
    notes = []
    if len(run.history) > POINTS:
        notes.append(
            f"{len(run.history):,} lines were logged; the curves draw about {POINTS:,} of them, evenly spaced."
        )
    losses, measures = loss_figures(run.history), measure_figures(run.history)
    if run.variants:
        losses, measures = _curves_of_variants(run)
    return {
        "title": str(summary.get("run") or run.directory.name),
        "identity": _identity(summary, sae),
        "cards": [(label(n), *_shown(metrics[n]), meanings.get(n, ""), _beside(summary, n)) for n in headline],
        "metrics": [(n, *_shown(v), meanings.get(n, ""), _beside(summary, n)) for n, v in metrics.items()],
        "measured_on": _measured_on(summary),
        "losses": [(n, *_shown(v)) for n, v in _dict(summary.get("losses")).items()],
        "variants": _variants(run),
        "variant_reports": [(name, _link(run, files.directory.report)) for name, files in run.variants.items()],
        "loss_figures": figures_of("loss", losses),
        "measure_figures": figures_of("measure", measures),
        "curve_notes": notes,
        "analyses": analyses,
        "timing": [(name, duration(s)) for name, s in _dict(summary.get("seconds")).items() if is_number(s)],
        "plugins": [
            [str(_dict(p).get(key) or "") for key in ("name", "distribution", "version")]
            for p in _list(summary.get("plugins"))
        ],
        "config": run.config,
        "provenance": list(_flat(run.provenance)),
        "failed": [(name, str(reason)) for name, reason in _dict(summary.get("failed")).items()],
        "warnings": [str(w) for w in _list(summary.get("warnings"))],
        "problems": [*run.problems, *(f"{name}: {text}" for name, v in run.variants.items() for text in v.problems)],
    }


def _measured_on(summary: dict[str, Any]) -> list[str]:
    """How much held-out data each metric saw, and what is to be noted about it."""
    counts = {name: of for name, of in _dict(summary.get("held_out")).items() if isinstance(of, dict)}
    lines = [f"{', '.join(names)}: {amount}." for names, amount in held_out_amounts(counts)]
    return [*lines, *map(str, _list(summary.get("notes")))]


def _identity(summary: dict[str, Any], sae: dict[str, Any]) -> list[tuple[str, str]]:
    facts: list[tuple[str, Any]] = [
        ("recipe", summary.get("recipe")),
        ("model", summary.get("model")),
        ("hook point", summary.get("hook_point")),
    ]
    size = f"{number(sae['d_in'])} → {number(sae['d_sae'])} latents" if sae.get("d_in") and sae.get("d_sae") else ""
    facts.append(("SAE", ", ".join(str(part) for part in (sae.get("architecture"), size) if part)))
    facts.append(("variants", len(_dict(summary.get("variants"))) or None))
    if is_number(summary.get("tokens")):
        steps = summary.get("steps")
        facts.append(
            ("trained on", f"{count(summary['tokens'])} tokens" + (f", {number(steps)} steps" if steps else ""))
        )
    if is_number(summary.get("tokens_per_second")):
        facts.append(("speed", f"{count(summary['tokens_per_second'])} tokens/s"))
    if is_number(summary.get("peak_memory_bytes")):
        facts.append(("peak memory", memory(summary["peak_memory_bytes"])))
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _variants(run: RunFiles) -> Table | None:
    """A row for each variant: what it is, and its headline metrics."""
    if not run.variants:
        return None
    rows = []
    for name, files in run.variants.items():
        summary = files.summary
        row = {"variant": name, **{key: _dict(summary.get("sae")).get(key, "") for key in ("architecture", "d_sae")}}
        metrics = _dict(summary.get("metrics"))
        for key in _list(summary.get("headline")):
            if key in metrics:
                row[key] = metrics[key]
                if ends := interval(_dict(_dict(summary.get("estimates")).get(key)).get("interval")):
                    row[f"{key}, 95%"] = ends
        rows.append(row)
    return _table("Variants", rows, "")


def _curves_of_variants(run: RunFiles) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """A chart of everything that was logged, with a line for each variant: the losses, and everything else."""
    histories = {name: files.history for name, files in run.variants.items()}
    names = dict.fromkeys(name for history in histories.values() for name in logged_names(history))
    losses = [name for name in names if name.startswith("loss")]
    return overlaid(histories, losses), overlaid(histories, [n for n in names if n not in losses], legend=False)


def _analysis(position: int, name: str, result: dict[str, Any], run: RunFiles) -> Analysis:
    identifier = f"analysis-{position}"
    tables = dict(result.get("tables", {}))
    latents: list[Latent] = []
    latents_note = ""
    for key, rows in list(tables.items()):
        if rows and (examples := of_rows(rows)) is not None:
            latents, latents_note = by_latent(examples, tables.get("latents", []), name)
            del tables[key]
            break
    return Analysis(
        id=identifier,
        name=name,
        notes=[str(note) for note in result.get("notes", [])],
        scalars=[(key, *_shown(value, interval)) for key, value, interval in with_intervals(result.get("scalars", {}))],
        figures=figures_of(identifier, result.get("figures", {})),
        tables=[_table(key, rows, name) for key, rows in tables.items()],
        latents=latents,
        latents_note=latents_note,
        files=[_file(str(path), name, run) for path in result.get("files", [])],
    )


def _shown(value: Any, interval: str = "") -> tuple[str, bool]:
    """A value's text, and whether it is defined: an undefined score must not look like a zero."""
    if isinstance(value, (dict, list)):
        return _compact(value), True
    return number(value) + interval, number(value) != NOT_DEFINED


def _beside(summary: dict[str, Any], name: str) -> list[str]:
    """What stands beside a metric: its interval, what it was measured on, its note."""
    known = _dict(_dict(summary.get("estimates")).get(name))
    ends, n = interval(known.get("interval")), _dict(known.get("n"))
    on = "on " + ", ".join(f"{count(size)} {what}" for what, size in n.items() if is_number(size)) if n else ""
    return [text for text in (f"95%: {ends}" if ends else "", on, str(known.get("note") or "")) if text]


def figures_of(prefix: str, figures: dict[str, dict[str, Any]]) -> list[Figure]:
    """The figures of a section, each with the id of its data in the page."""
    return [
        Figure(
            f"{prefix}-figure-{position}", name, {"data": safe(spec["data"]), "layout": safe(_dict(spec.get("layout")))}
        )
        for position, (name, spec) in enumerate(figures.items())
    ]


LINK = re.compile(r"<(?=\s*/?\s*a\b)", re.IGNORECASE)


def safe(value: Any) -> Any:
    """`value` as strict JSON (NaN becomes null) and without links, which plotly would render."""
    if isinstance(value, dict):
        return {str(key): safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return LINK.sub("&lt;", value) if isinstance(value, str) else value


def _table(name: str, rows: list[dict[str, Any]], analyzer: str) -> Table:
    columns = list({str(key): None for row in rows for key in row})
    shown = rows[:TABLE_ROWS]
    cells = [[_cell(row.get(column, "")) for column in columns] for row in shown]
    numeric = [any(is_number(row.get(column)) for row in shown) for column in columns]
    note = ""
    if len(rows) > TABLE_ROWS:
        note = f"The first {TABLE_ROWS:,} of {len(rows):,} rows; all of them are in analysis/{analyzer}/result.json."
    return Table(name, columns, numeric, cells, note)


def _cell(value: Any) -> Cell:
    if is_number(value):
        # Integers may be identifiers, such as a latent's index, so they have no separators.
        return Cell(str(value) if isinstance(value, int) else number(value), float(value))
    return Cell(_compact(value) if isinstance(value, (dict, list)) else number(value))


def _compact(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else text[:399] + "…"


def _file(path: str, analyzer: str, run: RunFiles) -> tuple[str, str | None]:
    """A file that the analyzer wrote, and a link if it is in the analyzer's directory."""
    home = run.directory.analysis(analyzer)
    try:
        inside = (home / path).resolve().is_relative_to(home.resolve()) and (home / path).is_file()
    except (OSError, ValueError):
        inside = False
    return path, _link(run, home / path) if inside else None


def _link(run: RunFiles, path: Path) -> str:
    """A link from the report to a file of the run."""
    return quote(path.relative_to(run.directory.path).as_posix())


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as pairs of `section.key` and value."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict) and item:
            rows += _flat(item, f"{name}.")
        elif isinstance(item, list) and all(isinstance(part, str) for part in item):
            rows.append((name, " ".join(item)))
        else:
            rows.append((name, item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)))
    return rows


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
