"""`saekit.run`: the command in Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saekit.config import RunConfig
from saekit.errors import UsageError
from saekit.plugins import Registry
from saekit.run_directory import RunDirectory
from saekit.run_file import Override
from saekit.runner.compose import Request, compose
from saekit.runner.plan import RunPlan, plan_run


@dataclass(frozen=True)
class FinishedRun:
    """A finished run. directory: where its files are. summary: the content of `summary.json`."""

    directory: Path
    summary: dict[str, Any]

    @property
    def variants(self) -> dict[str, FinishedRun]:
        """Each variant by its name, like a run: its directory holds its `sae/`, `analysis/` and `metrics.jsonl`."""
        place = RunDirectory(self.directory)
        return {name: FinishedRun(place.of_variant(name).path, own) for name, own in self.summary.get("variants", {}).items()}


def run(
    what: str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    plugins: Iterable[str | Path] = (),
    directory: str | Path | None = None,
    view: Any = None,
) -> FinishedRun:
    """Run a recipe or a run file, without output unless a `view` (a listener) is given.

    what: a recipe's name, the path of a run file, or a run file's content; the default recipe if None.
    overrides: `{"training.seed": 1}`.
    plugins: Python files to load as plugins. Raises the errors of `saekit.errors`.
    """
    config, registry = composed(what, overrides, plugins)
    plan = plan_run(config, registry)
    return start(plan, registry, None if directory is None else str(directory), view)


def composed(
    what: str | Path | Mapping[str, Any] | None, overrides: Mapping[str, Any] | None, plugins: Iterable[str | Path]
) -> tuple[RunConfig, Registry]:
    """The configuration and the plugins of a run that Python describes; see `run`."""
    named = what if what is None else _toml_value("what", what) if isinstance(what, Mapping) else str(what)
    changes = [(key, f"overrides: {key}", value) for key, value in (overrides or {}).items()]
    changed = [Override(key, _toml_value(where, value), where) for key, where, value in changes]
    return compose(Request(named, overrides=changed, plugins=[str(p) for p in plugins]))


def start(plan: RunPlan, registry: Registry, directory: str | None, view: Any) -> FinishedRun:
    """Run a plan in a new directory."""
    from saekit.runner.run import Run

    with RunDirectory.create(plan.config, directory) as place:
        return FinishedRun(place.path, Run(plan, place, registry, view=view).execute())


def resume(where: str, *, no_plugins: Iterable[str] = (), view: Any = None) -> FinishedRun:
    """Continue the run in the directory `where` from its newest whole checkpoint. Of a finished run, the metrics and analyzers
    that failed are carried out again; one in which nothing failed is left as it is."""
    from saekit.runner.run import Run, show_finished

    with RunDirectory.resume(where) as (place, config):
        summary = place.finished_summary()
        if summary is not None and not summary.get("failed"):
            show_finished(place, summary, view)
            return FinishedRun(place.path, summary)
        registry = Registry(files=config.plugins, disabled=no_plugins)
        registry.refuse_broken_files()
        plan = plan_run(config, registry)
        run = Run(plan, place, registry, view=view)
        return FinishedRun(place.path, run.execute() if summary is None else run.measure_again(summary))


def _toml_value(key: str, value: Any) -> Any:
    """`value` in the types that a run file can hold; UsageError if that is not possible."""
    if isinstance(value, Mapping):
        return {str(name): _toml_value(f"{key}.{name}", inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_toml_value(key, inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if value is None:
        raise UsageError(f"{key}: None cannot be written in a run file; leave the key out.")
    if not isinstance(value, str | int | float):
        raise UsageError(f"{key}: {value!r} cannot be written in a run file.")
    return value
