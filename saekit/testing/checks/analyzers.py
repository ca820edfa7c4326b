"""The checks of an analyzer, on a finished tiny run; those of a comparison are the same, of its own context."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from saekit.result import Result
from saekit.runner.comparison import ComparisonContext
from saekit.runner.context import RunContext
from saekit.testing.checks import any_kind
from saekit.testing.checks.shared import changed, copied, seeded
from saekit.testing.kit import Check, Failed, Subject
from saekit.testing.tiny import TinyRun, finished_run

Context = RunContext | ComparisonContext


def run_of(subject: Subject) -> TinyRun:
    """A finished run that provides what it needs; of two variants for a comparison."""
    return finished_run(subject.component.needs, subject.registry, variants=subject.component.kind == "comparison")


def context_of(subject: Subject) -> Context:
    """The context of a finished run that provides what it needs, with an empty directory to write in."""
    run = run_of(subject)
    context: Context = run.together if subject.component.kind == "comparison" else run.context
    place = subject.place / "analysis"
    place.mkdir(exist_ok=True)
    return dataclasses.replace(context, directory=place)


def answer(subject: Subject, context: Context | None = None) -> Any:
    """What it returns for a finished run."""
    with torch.random.fork_rng(devices=[]), seeded(0):
        torch.manual_seed(0)
        return subject.build()(context or context_of(subject))


def result_of(subject: Subject, context: Context | None = None) -> Result:
    result = answer(subject, context)
    if not isinstance(result, Result):
        raise Failed(f"it returns {type(result).__name__}. Return a saekit.Result.")
    return result


# --- the checks ------------------------------------------------------------------------------------------------


def gives_a_result(subject: Subject) -> None:
    for name, value in result_of(subject).scalars.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, int | float)):
            raise Failed(f"scalar {name!r} is {type(value).__name__}. Give plain numbers: float(...), or None if undefined.")


def can_be_written(subject: Subject) -> None:
    result = result_of(subject)
    try:
        json.dumps(result.to_json())
    except (TypeError, ValueError) as error:
        raise Failed(f"its result cannot be written as JSON: {error}. Give lists and plain numbers: tensor.tolist().") from None
    for name, rows in result.tables.items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise Failed(f"table {name!r} is not a list of dictionaries, one for each row.")
    for name, figure in result.figures.items():
        if not isinstance(figure, dict) or "data" not in figure:
            raise Failed(f"figure {name!r} is not a plotly figure. Give figure.to_plotly_json().")


def writes_in_its_directory(subject: Subject) -> None:
    run, context = run_of(subject), context_of(subject)
    elsewhere = subject.place / "elsewhere"
    elsewhere.mkdir()
    before = _files(run.directory)
    with contextlib.chdir(elsewhere):
        result = result_of(subject, context)
    if _files(elsewhere):
        raise Failed(f"it writes {sorted(_files(elsewhere))[0]} where the command was run. Write under context.directory.")
    if _files(run.directory) != before:
        new = sorted(set(_files(run.directory)) ^ set(before))
        raise Failed(f"it changes {new[0] if new else 'a file'} of the run. Write only under context.directory.")
    for name in result.files:
        if Path(name).is_absolute() or not (context.directory / name).is_file():
            raise Failed(f"`files` names {name!r}, which is not in its directory. Give paths relative to context.directory.")


def deterministic(subject: Subject) -> None:
    what = changed(copied(result_of(subject).to_json()), copied(result_of(subject).to_json()))
    if what:
        raise Failed(f"{what} differs the second time. Draw from a generator seeded with context.seed.")


def inputs_unchanged(subject: Subject) -> None:
    context = context_of(subject)
    with _unchanged(context):
        answer(subject, context)


@contextlib.contextmanager
def _unchanged(context: Context) -> Iterator[None]:
    seen = [one.context for one in context.variants.values()] if isinstance(context, ComparisonContext) else [context]
    model = getattr(getattr(seen[0].source, "subject", None), "model", None)
    weights: dict[str, torch.nn.Module] = {
        f"the SAE{f' of variant {one.directory.name}' if len(seen) > 1 else ''}": one.sae for one in seen
    }
    weights |= {"the model": model} if isinstance(model, torch.nn.Module) else {}
    before = {name: (copied(module.state_dict()), module.training) for name, module in weights.items()}
    yield
    for name, module in weights.items():
        if changed(before[name][0], copied(module.state_dict())) or before[name][1] != module.training:
            raise Failed(f"it changes {name}. Use saekit.attach, which undoes what it does, or work on a copy.")


def _files(place: Path) -> dict[str, tuple[int, int]]:
    """The files under a directory with their sizes and times."""
    found = {}
    for path in place.rglob("*"):
        if path.is_file():
            status = path.stat()
            found[str(path.relative_to(place))] = (status.st_size, status.st_mtime_ns)
    return found


CHECKS: tuple[Check, ...] = (
    *any_kind.CHECKS,
    Check("gives_a_result", "It runs on a finished run and returns a `Result` whose scalars are plain.", gives_a_result),
    Check("can_be_written", "`result.json` can hold its tables and figures.", can_be_written),
    Check(
        "writes_in_its_directory",
        "It writes only under `context.directory`, and names what it wrote.",
        writes_in_its_directory,
    ),
    Check("deterministic", "The same run gives the same result.", deterministic),
    Check("inputs_unchanged", "It leaves the SAE and the model as they were.", inputs_unchanged),
)
