"""What lies in a run directory, read for showing: damage is noted and skipped, never a crash."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saekit.errors import UsageError


@dataclass
class RunFiles:
    """The readable content of a run directory.

    summary: summary.json, or {} for a run that has not finished.
    history: one dictionary a logged step.
    config: run.toml as text.
    provenance: provenance.json.
    analyses: analysis/NAME/result.json by name, in the form of `Result.to_json`.
    variants: by name what lies in variants/NAME, in the order of the summary, or of the names in a run without one.
    problems: a sentence for everything that is missing or damaged.
    """

    directory: Path
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    config: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    analyses: dict[str, dict[str, Any]] = field(default_factory=dict)
    variants: dict[str, RunFiles] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_run(directory: Path) -> RunFiles:
    """Read `directory`. Raises UsageError where it is not a run directory at all."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UsageError(f"{directory}: there is no such directory. Give a run directory, such as runs/NAME.")
    if not any((directory / name).is_file() for name in ("run.toml", "summary.json", "metrics.jsonl")):
        raise UsageError(
            f"{directory}: is not a run directory: it has none of run.toml, summary.json and metrics.jsonl. "
            "Give a directory that `saekit run` made."
        )
    run = RunFiles(directory)
    run.summary = _read_object(directory / "summary.json", run.problems, "the run has not finished")
    run.provenance = _read_object(directory / "provenance.json", run.problems, "what made this run is not known")
    run.variants = {path.name: read_run(path) for path in variants_of(directory)}
    if not run.variants:
        run.history = read_history(directory / "metrics.jsonl", run.problems)
    config = directory / "run.toml"
    if config.is_file():
        run.config = config.read_bytes().decode("utf-8", errors="replace")
    else:
        run.problems.append("run.toml is missing: the configuration is not known.")
    for path in sorted(directory.glob("analysis/*/result.json")):
        content = _read_object(path, run.problems, "it is left out")
        if content:
            run.analyses[path.parent.name] = _as_result(
                content, f"analysis/{path.parent.name}/result.json", run.problems
            )
    return run


def name_of(directory: Path) -> str:
    """What a run is called that has no summary yet: by its directory, a variant with its run's."""
    place = directory.resolve()
    return f"{place.parents[1].name}/{place.name}" if place.parent.name == "variants" else place.name


def variants_of(directory: Path) -> list[Path]:
    """The directories of a run's variants, in the order of its summary, or by name where it has none."""
    found = sorted(path.parent for path in directory.glob("variants/*/run.toml"))
    order = list(_dict(_read_object(directory / "summary.json", [], "").get("variants")))
    return sorted(found, key=lambda path: order.index(path.name) if path.name in order else len(order))


def read_history(path: Path, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole. A run killed while writing leaves half a line: that one is expected
    at the end, and reported elsewhere."""
    problems = [] if problems is None else problems
    if not path.is_file():
        problems.append(f"{path.name} is missing: there are no curves to draw.")
        return []
    history: list[dict[str, Any]] = []
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    damaged = 0
    for position, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            history.append(row)
        elif position < len(lines) - 1:
            damaged += 1
    if damaged:
        problems.append(f"{path.name}: {damaged} of {len(lines)} lines cannot be read and are left out.")
    return history


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_object(path: Path, problems: list[str], without: str) -> dict[str, Any]:
    name = "/".join(path.parts[-3:]) if path.name == "result.json" else path.name
    try:
        value = json.loads(path.read_bytes().decode("utf-8", errors="replace"))
    except FileNotFoundError:
        problems.append(f"{name} is missing: {without}.")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{name} cannot be read ({error}): {without}.")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{name} does not hold a JSON object: {without}.")
        return {}
    return value


def _as_result(content: dict[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    """`content` with each part in the shape that `Result.to_json` promises; what has another shape is left out."""
    shapes: dict[str, type] = {"scalars": dict, "tables": dict, "figures": dict, "files": list, "notes": list, "headline": list}
    result: dict[str, Any] = {}
    for key, shape in shapes.items():
        value = content.get(key)
        if value is not None and not isinstance(value, shape):
            problems.append(f"{name}: {key} is not a JSON {'object' if shape is dict else 'array'} and is left out.")
        result[key] = value if isinstance(value, shape) else shape()
    for key, table in list(result["tables"].items()):
        if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
            problems.append(f"{name}: table {key!r} is not a list of rows and is left out.")
            del result["tables"][key]
    for key, figure in list(result["figures"].items()):
        if not isinstance(figure, dict) or not isinstance(figure.get("data"), list):
            problems.append(f"{name}: figure {key!r} is not a plotly figure and is left out.")
            del result["figures"][key]
    return result
