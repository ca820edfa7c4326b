"""`ComparisonContext`: what a comparison is given, and how one is carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.errors import PluginError, SaekitError
from saekit.files import DiskFull, disk_errors, to_jsonable
from saekit.numerics import seeded
from saekit.process_state import kept
from saekit.result import Result
from saekit.run_directory import RunFiles, read_run
from saekit.runner.blame import alone, blamed_on, explained
from saekit.runner.summary import results_of
from saekit.seeds import seed_for

if TYPE_CHECKING:
    from saekit.config import RunConfig
    from saekit.runner.context import RunContext
    from saekit.runner.plan import Part
    from saekit.runner.run import Run
    from saekit.runner.sae_run import SAERun


@dataclass(frozen=True)
class Compared:
    """One of the SAEs that are compared, and what is known of it.

    context: as analyzers get it: `sae`, `config`, `source`, `held_out()`. Its directory is the variant's own; nothing is written
        there.
    summary: its results as in `summary.json`: `metrics`, `analysis` (the scalars of each analyzer), `failed`, `losses`, ...
    """

    context: RunContext
    summary: Mapping[str, Any]

    @cached_property
    def results(self) -> dict[str, Result]:
        """What was found of this SAE, by the names of the directories in `analysis/`, read from there. An analyzer that failed has
        none."""
        others = {entry.label for entry in self.context.config.comparison}
        return {name: Result(**found) for name, found in self._files.analyses.items() if name not in others}

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, in order: `step`, and the values that were logged. Empty if nothing was."""
        return self._files.history

    @cached_property
    def _files(self) -> RunFiles:
        return read_run(self.context.directory)


@dataclass(frozen=True)
class ComparisonContext:
    """All SAEs of a run, when everything is known of each.

    variants: by name, in the order of the run file. A run without variants has one, under the run's `recipe`.
    config: of the whole run.
    directory: where a comparison may write files.
    warn: tells the user.
    """

    variants: Mapping[str, Compared]
    config: RunConfig
    directory: Path
    warn: Callable[[str], None]

    @property
    def seed(self) -> int:
        """The seed of every draw."""
        return self.config.training.seed


def name_alone(config: RunConfig) -> str:
    """What the only SAE of a run is called in a comparison."""
    return config.recipe or "run"


def compare(run: Run, part: Part) -> None:
    """Carry out one comparison. If it fails, or changes an SAE, that costs its own result alone."""
    directory = run.directory.analysis(part.label)
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        run.directory.result(part.label).unlink(missing_ok=True)  # of an earlier attempt
    try:
        with explained([part]), blamed_on(part), kept(part.component.origin, run.warn):
            # A sequence of random numbers of its own, so that it finds the same when it is carried out alone.
            with seeded(seed_for(run.config.training.seed, part.key), run.device):
                result = part.build()(_context(run, directory))
            if not isinstance(result, Result):
                raise TypeError(f"it returned {type(result).__name__}, not a saekit.Result")
            _refuse_changes(run, part)
            run.directory.write_analysis(part.label, result)
    except DiskFull:
        raise
    except SaekitError as error:
        run.failed[part.key] = alone(error)
        for one in run.sae_runs:
            one.put_right(thoroughly=True)
        _tell(run, "warned", message=f"{error} The run goes on without it.")
        return
    run.compared[part.label] = result
    _tell(run, "analysed", name=part.label, result=result, variant="")


def _tell(run: Run, hook: str, **values: Any) -> None:
    """Call a hook on the view, and on the listeners of the only SAE if the run has no variants."""
    for one in run.sae_runs:
        if not one.variant:
            one.listeners.call(hook, **values)
    run.listeners.emit(hook, **values)


def _context(run: Run, directory: Path) -> ComparisonContext:
    variants = {one.variant or name_alone(run.config): _compared(one) for one in run.sae_runs}
    return ComparisonContext(variants, run.config, directory, run.warn)


def _compared(one: SAERun) -> Compared:
    return Compared(one.context, to_jsonable(results_of(one)))


def _refuse_changes(run: Run, part: Part) -> None:
    for one in run.sae_runs:
        changes = one.put_right(thoroughly=True)
        if changes:
            whose = f" of variant {one.variant!r}" if one.variant else ""
            raise PluginError(
                f"{part.component.origin} changed the SAE{whose} ({', '.join(changes)}), so its result is not kept; the SAE has "
                "been read again from disk. It should work on a copy: copy.deepcopy(context.variants[name].context.sae)."
            )
