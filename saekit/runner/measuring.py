"""`MeasuredSAE`: a trained SAE's metrics and analyses, each of which may fail alone and changes nothing for the others."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from saekit.activations.batch import Activations
from saekit.errors import PluginError, RunError, SaekitError
from saekit.estimate import Estimate, value_of
from saekit.files import DiskFull, disk_errors, to_jsonable
from saekit.graph import FeatureGraph
from saekit.listeners import Listeners
from saekit.numerics import seeded
from saekit.plugins import Registry
from saekit.process_state import kept
from saekit.protocols import RunInfo, Source
from saekit.result import Result
from saekit.runner.blame import alone, blamed_on, explained
from saekit.runner.context import RunContext
from saekit.runner.held_out import CountedSource, HeldOutUse
from saekit.runner.plan import Part, SAEPlan
from saekit.runner.unchanged import Unchanged
from saekit.sae.base import SparseAutoencoder
from saekit.sae.formats import load_sae
from saekit.seeds import seed_for


class MeasuredSAE:
    """An SAE, what is measured of it, and what came out.

    variant: its name; empty if it is the only one.
    plan, config, directory: of this SAE, as if it were alone.
    info: what its listeners are told of the run.
    graph: once built, if the run file asks for one.
    found: what callbacks found in training, by their labels.
    metrics, headline, meanings: once evaluated.
    held_out: how much held-out data each metric was given.
    estimates: what stands beside some metrics: intervals, numbers, sentences.
    analysis: each analyzer's scalars.
    analysis_notes: each analyzer's notes.
    failed: the errors of metrics and analyzers that failed, by their keys in the run file.
    losses: as logged last.
    calibrated: what was set after training, and on how many `tokens`; empty if nothing was.
    """

    source: Source
    device: torch.device
    sae: SparseAutoencoder

    def __init__(self, plan: SAEPlan, info: RunInfo, registry: Registry, above: Listeners) -> None:
        self.plan, self.info, self.registry = plan, info, registry
        self.config, self.directory, self.variant = info.config, info.directory, info.variant
        self.graph: FeatureGraph | None = None
        self.found: dict[str, Result] = {}
        self.metrics: dict[str, float | None] = {}
        self.estimates: dict[str, dict[str, Any]] = {}
        self.headline: list[str] = []
        self.meanings: dict[str, str] = {}
        self.held_out: dict[str, dict[str, int | None]] = {}
        self.analysis: dict[str, dict[str, Any]] = {}
        self.analysis_notes: dict[str, list[str]] = {}
        self.failed: dict[str, SaekitError] = {}
        self.losses: dict[str, float] = {}
        self.calibrated: dict[str, float] = {}
        self.listeners = Listeners(above, f"variant {self.variant!r}: " if self.variant else "")
        self._metrics: list[tuple[Part, Any]] = []
        self._use: dict[str, HeldOutUse] = {}
        self._again: set[str] | None = None  # the keys of what is measured again; None in a run from the beginning
        self._prepared: dict[str, Any] = {}  # analyzers that have been prepared before training, by their key

    def recall(self, told: dict[str, Any]) -> None:
        """Take up what a finished run wrote, with `told` as its summary: the SAE, the graph, every result but those that
        failed, which are to be measured again."""
        self.sae = load_sae(self.directory.sae, device=self.device, registry=self.registry)
        if self.plan.graph is not None:
            self.graph = FeatureGraph.load(self.directory.graph).to(self.device)
        self.found = {
            part.label: Result.read(file) for part in self._with_results() if (file := self.directory.result(part.label)).is_file()
        }
        self._again, self._unchanged = set(told["failed"]), Unchanged(self.sae)
        self.metrics, self.headline, self.meanings = told["metrics"], told["headline"], told["meanings"]
        self.analysis, self.analysis_notes, self.losses = told["analysis"], told["analysis_notes"], told["losses"]
        self.estimates, self.held_out, self.calibrated = told["estimates"], told["held_out"], told["sae"]["calibrated"]
        self.listeners.warnings += [message for message in told["warnings"] if message not in self.listeners.warnings]

    def to_do(self, section: str) -> list[Part]:
        """The metrics or analyzers that are to be carried out."""
        return [part for part in self.plan.sections[section] if self._again is None or part.key in self._again]

    def _with_results(self) -> list[Part]:
        """The callbacks that say what they found."""
        return [part for part in self.plan.sections["callback"] if hasattr(part.component.load(), "result")]

    def _context(self, directory: Path, scale: float = 1.0, target_scale: float = 1.0) -> RunContext:
        return RunContext(
            self.sae,
            self.source,
            self.config,
            self.device,
            directory,
            self.listeners.warn,
            scale,
            target_scale,
            graph=self.graph,
            found=self.found,
        )

    def _measuring(self, part: Part) -> RunContext:
        """The context of a metric: what it takes of the held-out data is counted."""
        use = self._use.setdefault(part.label, HeldOutUse())
        return dataclasses.replace(self.context, source=CountedSource(self.source, use), use=use)

    @property
    def context(self) -> RunContext:
        """What metrics are given of the trained SAE; an analyzer gets the same with its own directory."""
        return self._context(self.directory.path)

    # --- guards ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _at_work(self, part: Part) -> Iterator[None]:
        """A component is at work in the block: its errors name it, and it changes nothing of the process."""
        with blamed_on(part), kept(part.component.origin, self.listeners.warn):
            yield

    @contextlib.contextmanager
    def _guarded(self, part: Part, *, thoroughly: bool = True) -> Iterator[None]:
        """A metric or an analyzer is at work in the block. It must leave the SAE as it is for those after it; and if it
        fails, that costs its own result alone.

        thoroughly: read the whole SAE for changes, not only the marks that torch keeps."""
        try:
            with explained([part]), self._at_work(part):
                yield
            changes = self.put_right(thoroughly)
            if changes:
                raise PluginError(
                    f"{part.component.origin} changed the SAE that it was given ({', '.join(changes)}), so its result is not "
                    "kept; for the others the SAE has been read again from disk. It should work on a copy: "
                    "copy.deepcopy(context.sae)."
                )
        except DiskFull:
            raise
        except SaekitError as error:
            self.put_right(thoroughly=True)
            self.failed[part.key] = alone(error)
            who = f"variant {self.variant!r}: " if self.variant else ""
            self.listeners.emit("warned", message=f"{who}{error} The run goes on without it.")

    def put_right(self, thoroughly: bool) -> list[str]:
        """What is different of the SAE, which is then as it is on disk again.

        thoroughly: read the whole SAE for changes, not only the marks that torch keeps."""
        untouched = self._unchanged.is_untouched()
        if untouched and not thoroughly:
            return []
        changes = self._unchanged.changes()
        if changes:
            saved = load_sae(self.directory.sae, device=self.device, registry=self.registry)
            with contextlib.suppress(RuntimeError):  # other tensors than it had: then it is replaced
                self.sae.load_state_dict(saved.state_dict())  # in place, for those that have kept it
            if self._unchanged.changes():
                self.sae = saved
        if changes or not untouched:
            self.sae.to(self.device).requires_grad_(False)
            self._unchanged = Unchanged(self.sae)
        return changes

    # --- evaluate ----------------------------------------------------------------------------------------------

    def begin_evaluation(self) -> None:
        """Build the metrics."""
        self.sae.requires_grad_(False)
        self._evaluated = self._not_finite = 0
        self._unchanged = Unchanged(self.sae)
        self._metrics = []
        for part in self.to_do("metric"):
            with self._guarded(part):
                metric = part.build()
                if hasattr(metric, "prepare"):
                    metric.prepare(self._measuring(part))
                self._metrics.append((part, metric))

    def evaluate_on(self, batch: Activations) -> None:
        """Hand one held-out batch to every metric that streams."""
        step, is_first = self.context.step(batch), not self._evaluated
        self._evaluated += len(batch)
        self._not_finite += int((~step.reconstruction.isfinite().all(1)).sum())
        for part, metric in self._metrics:
            if hasattr(metric, "update"):
                with self._guarded(part, thoroughly=is_first):
                    metric.update(step)
        self._metrics = [(part, metric) for part, metric in self._metrics if part.key not in self.failed]

    def end_evaluation(self, streamed: HeldOutUse) -> None:
        """Compute every metric; those that need the model run it now. streamed: what the others were given."""
        whose: dict[str, Part] = {}
        if self._not_finite:
            self.listeners.warn(
                f"{self._not_finite:,} of {self._evaluated:,} reconstructions of held-out activations are not finite."
            )
        for part, metric in self._metrics:
            warned = len(self.listeners.warnings)
            values: dict[str, float | None] = {}
            with self._guarded(part):
                given = metric.compute() if hasattr(metric, "update") else metric.measure(self._measuring(part))
                values = {name: value_of(value) for name, value in given.items()}
                beside = {name: value.beside() for name, value in given.items() if isinstance(value, Estimate) and value.beside()}
                for name in values.keys() & self.metrics.keys():
                    raise RunError(_both_return(name, *filter(None, [whose.get(name), part])))
            if part.key in self.failed:
                self._use.pop(part.label, None)
                continue
            if hasattr(metric, "update"):
                self._use.setdefault(part.label, HeldOutUse()).merge(streamed)
            self.metrics |= values
            self.estimates |= beside
            whose |= dict.fromkeys(values, part)
            self._say_why(metric, values, has_warned=len(self.listeners.warnings) > warned)
            self.headline += [n for n in getattr(metric, "headline", ()) if n in values and n not in self.headline]
            self.meanings |= getattr(metric, "meanings", {})
        self._metrics = []
        self.held_out |= {name: use.counts(self.source) for name, use in self._use.items() if use}
        self.listeners.emit("evaluated", metrics=self.metrics, variant=self.variant)

    def _say_why(self, metric: Any, values: dict[str, Any], *, has_warned: bool) -> None:
        """Warn of values that are not defined, with the reason in the metric's `undefined`, unless it has warned itself."""
        reasons: dict[str, list[str]] = {}
        known = getattr(metric, "undefined", {})
        for name in values:
            value = self.metrics[name]
            if value is not None and not math.isfinite(value):
                reasons.setdefault(f"it is {value}", []).append(name)
            elif value is None and (name in known or not has_warned):
                reasons.setdefault(known.get(name, "the metric gives no value and no reason"), []).append(name)
        for reason, names in reasons.items():
            self.listeners.warn(f"Not defined on held-out data: {', '.join(names)} ({reason}).")

    # --- analyse -----------------------------------------------------------------------------------------------

    def analyse(self, part: Part) -> None:
        """Carry out one analyzer."""
        directory = self.directory.analysis(part.label)
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self.directory.result(part.label).unlink(missing_ok=True)  # of an earlier attempt
        # A sequence of random numbers of its own, so that it finds the same when it is carried out alone.
        with self._guarded(part), seeded(seed_for(self.config.training.seed, part.key), self.device):
            analyzer = self._prepared.get(part.key) or part.build()
            result = analyzer(self._context(directory))
            refuse_other_than_result(result)
        if part.key not in self.failed:
            with self._guarded(part, thoroughly=False):
                self._keep(part, result)
        if part.key not in self.failed:
            self.listeners.emit("analysed", name=part.label, result=result, variant=self.variant)

    def _keep(self, part: Part, result: Result) -> None:
        """Write the result of an analyzer or a callback, and its scalars and notes for the summary."""
        self.directory.write_analysis(part.label, result)
        self.analysis[part.label] = to_jsonable(dict(result.scalars))
        self.analysis_notes[part.label] = list(map(str, result.notes))


def refuse_other_than_result(result: Any) -> None:
    """TypeError for what a component gave in place of a `Result`."""
    if not isinstance(result, Result):
        raise TypeError(f"it returned {type(result).__name__}, not a saekit.Result")


def _both_return(name: str, *parts: Part) -> str:
    *first, last = (f"{part.key} ({part.component.title})" for part in parts)
    other = first[0] if first else "a metric that was measured before"
    return f"{other} and {last} both return {name!r}. Leave one out; what was saved is kept."
