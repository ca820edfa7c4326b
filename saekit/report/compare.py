"""Runs side by side: their metrics, where their configurations differ, and whether they can be compared at all."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saekit.config import RunConfig
from saekit.errors import UsageError, near_names
from saekit.kinds import LISTS
from saekit.report.curves import POINTS, bars, logged_names, overlaid
from saekit.report.page import Cell, Table, figures_of
from saekit.report.write import render_template
from saekit.run_directory import RunDirectory, RunFiles, read_run
from saekit.run_file import label_of
from saekit.wording import is_number, number

MISSING = "-"
FIGURES = ("tokens", "steps", "tokens_per_second", "peak_memory_bytes")
"""Top-level numbers of a summary."""
SUBJECT = {"model": "models", "hook_point": "hook points"}
ORDERED = "callback"
"""The list whose order matters: callbacks are called in that order."""
NO_DIFFERENCE = {"directory", "defaults"}
"""Keys of a run file that do not affect the run: run.toml has the default components written out."""


@dataclass
class Side:
    """One run.

    values: every number of its results, by the name of its column.
    config: its run file, flat.
    identity: what its activations come from.
    state: empty for a finished run, otherwise how far it got.
    """

    name: str
    directory: Path
    values: dict[str, Any]
    config: dict[str, Any]
    identity: dict[str, Any]
    history: list[dict[str, Any]]
    state: str
    headline: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """What `saekit compare` shows. columns: names of values. differences: keys in which the run files differ."""

    sides: list[Side]
    columns: list[str]
    differences: list[str]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values; a value that a run lacks is absent, an undefined one is None."""
        return {
            "columns": self.columns,
            "runs": [
                {
                    "run": side.name,
                    "directory": str(side.directory),
                    "finished": not side.state,
                    "state": side.state or "finished",
                    "values": {name: side.values[name] for name in self.columns if name in side.values},
                    "differences": {key: side.config[key] for key in self.differences if key in side.config},
                }
                for side in self.sides
            ],
            "warnings": self.warnings,
        }


def compare(directories: Iterable[Path | str], metrics: Iterable[str] = (), *, everything: bool = False) -> Comparison:
    """Read run directories and compare them; a run of variants is replaced by its variants.

    metrics: names of columns, such as `explained_variance`, `losses.mse`, `analysis.features.dead`; by default every
        run's headline.
    everything: all values of all runs. UsageError for a name that no run has.
    """
    runs = map(RunDirectory.at, directories)
    members = [one.path for run in runs for one in run.variant_directories() or [run]]
    sides = [_side(directory) for directory in dict.fromkeys(members)]
    names = [side.name for side in sides]
    for side in sides:
        if names.count(side.name) > 1:
            side.name = str(side.directory)
    known = list(dict.fromkeys(name for side in sides for name in side.values))
    columns = list(dict.fromkeys(metrics))
    for name in columns:
        if name not in known:
            raise UsageError(
                f"--metric {name}: none of these runs has it.{near_names(name, known)} They have: {', '.join(known) or 'none'}."
            )
    if everything:
        columns += [name for name in known if name not in columns]
    columns = columns or list(dict.fromkeys(name for side in sides for name in side.headline))
    keys = dict.fromkeys(key for side in sides for key in side.config)
    differences = [key for key in keys if len({repr(side.config.get(key)) for side in sides if side.config}) > 1]
    return Comparison(sides, columns, differences, _warnings(sides))


def cells(side: Side, columns: list[str]) -> list[Cell]:
    """The row of a run: "-" for a value that it lacks, "not defined" for an undefined one."""
    row = []
    for name in columns:
        value = side.values.get(name, MISSING)
        row.append(Cell(number(value), float(value) if is_number(value) else None))
    return row


def in_numbers(value: Any) -> bool:
    """Whether a value is a number or None."""
    return value is None or is_number(value)


def setting(side: Side, key: str) -> str:
    """The value of `key` in a run's configuration, as text; "-" if it is not there."""
    value = side.config.get(key, MISSING)
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def comparison_page(comparison: Comparison, curves: Iterable[str] = ()) -> str:
    """One self-contained page: the tables, and a chart for each curve with a line for each run.

    curves: names of logged values, such as `loss/mse`; by default all. UsageError for one that no run logged.
    """
    sides = comparison.sides
    histories = {side.name: side.history for side in sides}
    known = list(dict.fromkeys(name for history in histories.values() for name in logged_names(history)))
    wanted = list(dict.fromkeys(curves)) or known
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"--curve {name}: none of these runs logged it.{near_names(name, known)} "
                f"They logged: {', '.join(known) or 'nothing'}."
            )
    notes = [f"{side.name} is unfinished: {side.state}." for side in sides if side.state]
    notes += [
        f"{side.name}: {len(side.history):,} lines were logged; the curves draw about {POINTS:,} of them."
        for side in sides
        if len(side.history) > POINTS
    ]
    # Losses are drawn large, with a legend; the rest is small and has the same colours.
    large = [name for name in wanted if name.startswith("loss")] or wanted
    small = [name for name in wanted if name not in large]
    content = {
        "title": f"{len(sides)} runs" if len(sides) > 1 else sides[0].name,
        "runs": [(side.name, str(side.directory), side.state) for side in sides],
        "warnings": comparison.warnings,
        "notes": notes,
        "values": Table(
            "Values",
            ["run", *comparison.columns],
            [False, *(all(in_numbers(s.values.get(name)) for s in sides) for name in comparison.columns)],
            [[Cell(side.name), *cells(side, comparison.columns)] for side in sides],
        ),
        "bars": figures_of("bars", bars({side.name: side.values for side in sides}, comparison.columns)),
        "differences": Table(
            "Differences",
            ["key", *(side.name for side in sides)],
            [False] * (len(sides) + 1),
            [[Cell(key), *(Cell(setting(side, key)) for side in sides)] for key in comparison.differences],
        ),
        "large_figures": figures_of("large", overlaid(histories, large)),
        "small_figures": figures_of("small", overlaid(histories, small, legend=False)),
    }
    return render_template("compare.html", content, has_figures=bool(wanted or len(sides) > 1))


def _side(directory: Path) -> Side:
    files = read_run(directory)
    config = _table(files.config)
    summary = files.summary
    values = _values(files)
    headline = [name for name in _list(summary.get("headline")) if name in values]
    headline += [
        column
        for name, result in files.analyses.items()
        for column in (f"analysis.{name}.{scalar}" for scalar in result["headline"])
        if column in values
    ]
    settings = {key: value for key, value in flat(config).items() if key not in NO_DIFFERENCE}
    identity = {key: settings.get(f"source.{key}") for key in SUBJECT}  # for a run that had hardly begun
    identity |= _dict(files.provenance.get("source"))
    identity |= {key: summary[key] for key in SUBJECT if summary.get(key) is not None}
    return Side(
        name=str(summary.get("run") or files.directory.name),
        directory=directory,
        values=values,
        config=settings,
        identity=identity,
        history=files.history,
        state="" if summary else _progress(files.history, config),
        headline=headline or list(_dict(summary.get("metrics")))[:6],
    )


def _values(files: RunFiles) -> dict[str, Any]:
    """Metrics by their own names, everything else by its path in summary.json."""
    summary = files.summary
    values = dict(_dict(summary.get("metrics")))
    values |= {f"losses.{name}": value for name, value in _dict(summary.get("losses")).items()}
    analyses = {name: result["scalars"] for name, result in files.analyses.items()}
    for name, scalars in {**analyses, **_dict(summary.get("analysis"))}.items():
        values |= {f"analysis.{name}.{key}": value for key, value in _dict(scalars).items()}
    values |= {name: summary[name] for name in FIGURES if name in summary}
    values |= {f"seconds.{name}": value for name, value in _dict(summary.get("seconds")).items()}
    return {name: value for name, value in values.items() if not isinstance(value, dict | list)}


def _progress(history: list[dict[str, Any]], config: Mapping[str, Any]) -> str:
    """How far a run without a summary got."""
    steps = [row["step"] for row in history if is_number(row.get("step"))]
    if not steps:
        return "nothing was logged"
    training = _dict(config.get("training"))
    tokens, batch = training.get("tokens"), training.get("batch_size")
    of = f" of {tokens // batch:,}" if isinstance(tokens, int) and isinstance(batch, int) and batch else ""
    return f"{int(steps[-1]) + 1:,}{of} steps"


def flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """A run file as `section.key` and value; an entry of a list goes by its name, as with `-o`."""
    rows: dict[str, Any] = {}
    for section, value in table.items():
        if section in LISTS and isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            labels = list(map(label_of, value))
            rows[section] = labels if section == ORDERED else sorted(labels)
            for entry in value:
                _flatten(f"{section}.{label_of(entry)}", {k: v for k, v in entry.items() if k not in ("use", "name")}, rows)
        else:
            _flatten(section, value, rows)
    # TOML writes lists before tables; a run file is read in the order of its sections.
    order = {section: place for place, section in enumerate(RunConfig.model_fields)}
    return dict(sorted(rows.items(), key=lambda row: order.get(row[0].partition(".")[0], len(order))))


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(f"{prefix}.{key}", inner, into)
    else:
        into[prefix] = value


def _warnings(sides: list[Side]) -> list[str]:
    """A line for everything that makes the runs' numbers hard to compare."""
    keys = dict.fromkeys(key for side in sides for key in side.identity)
    differing = [key for key in keys if len({str(s.identity[key]) for s in sides if s.identity.get(key) is not None}) > 1]
    lines = []
    for key, what in SUBJECT.items():
        if key in differing:
            each = ", ".join(f"{side.name}: {side.identity.get(key) or 'not known'}" for side in sides)
            lines.append(f"The runs have different {what} ({each}), so their values describe different activations.")
    rest = [key for key in differing if key not in SUBJECT]
    if rest:
        lines.append(f"The runs' activations were made differently: they differ in {', '.join(rest)}.")
    return lines


def _table(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
