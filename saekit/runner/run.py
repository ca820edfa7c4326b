"""The conductor: prepare -> train -> graph -> evaluate -> analyse -> report, each phase a short method.

The run owns the activations, the phases, the checkpoint and the clock; what each SAE does with a batch is in `SAERun`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch

from saekit.activations.batch import Activations, SequenceBatch
from saekit.activations.cache import CachedSource
from saekit.activations.progress import harvest_heard_by
from saekit.activations.shuffle import ShuffledBatches
from saekit.errors import RunError, SaekitError, UsageError, under_key
from saekit.files import DiskFull, to_jsonable, write_json
from saekit.listeners import Listener, Listeners
from saekit.out_of_memory import is_out_of_memory
from saekit.plugins import Registry
from saekit.process_state import kept
from saekit.protocols import RunInfo, Source
from saekit.report import write_report
from saekit.result import Result
from saekit.run_directory import RunDirectory
from saekit.runner.blame import explained
from saekit.runner.comparison import compare
from saekit.runner.hardware import choose_device, peak_memory
from saekit.runner.held_out import HeldOutUse
from saekit.runner.interruption import Interruption
from saekit.runner.plan import RunPlan
from saekit.runner.provenance import plugins_used, provenance, with_resumption
from saekit.runner.resume import decisive, refuse_other, what_changed
from saekit.runner.sae_run import SAERun, Sample
from saekit.runner.summary import summarise
from saekit.seeds import seed_for
from saekit.training.state import RunState

P = ParamSpec("P")
SCALE_SAMPLE = 16_384  # activations that decide the scale and the initial bias: enough for three digits


class Run:
    """One run: a plan carried out in a directory.

    plan, directory: what to do, and where.
    info: what the view is told of the run.
    sae_runs: one for each SAE that it trains, each given every batch.
    number: how many steps are done.
    seconds: how long each phase has taken.
    compared: what each comparison of them found.
    failed: the errors of comparisons that failed, by their keys in the run file.
    """

    _is_fed = False  # whether a program pushes what it trains on

    def __init__(self, plan: RunPlan, directory: RunDirectory, registry: Registry, *, view: Any = None) -> None:
        self.plan, self.directory, self.config, self.registry = plan, directory, plan.config, registry
        self.info = RunInfo(directory, plan.config, plan, "")
        self.seconds: dict[str, float] = {}
        self.compared: dict[str, Result] = {}
        self.failed: dict[str, SaekitError] = {}
        self.number = self.trained_tokens = self.tokens_this_time = 0
        self._harvest_told = time.perf_counter()
        self.listeners = Listeners()
        self._interruption = Interruption(directory.path)
        self.sae_runs = []
        for own in plan.members:
            info = RunInfo(directory.of_variant(own.variant), own.config, plan, own.variant)
            self.sae_runs.append(SAERun(own, info, registry, self.listeners))
        if view is not None:
            self.listeners.add(Listener("view", view, "the terminal view", vital=False))

    def execute(self) -> dict[str, Any]:
        """Carry the plan out; returns the content of `summary.json`. Listeners hear of a failure before it is raised.

        The error of a metric, an analyzer or a comparison is raised when everything else is written."""
        return self._carried_out(self._phases)

    def measure_again(self, before: dict[str, Any]) -> dict[str, Any]:
        """Carry out the metrics and analyzers that failed in this run, whose summary is `before`, and every comparison; the same
        as `execute` otherwise."""
        return self._carried_out(lambda: self._phases_again(before))

    def _carried_out(self, phases: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        with self._interruption.heard(), self._at_work():
            summary = phases()
        self._raise_failures(summary)
        return summary

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """The run is at work in the block. Listeners hear of an error before it is raised, in the words for the user."""
        try:
            with explained(self.plan.parts), harvest_heard_by(self._harvest_advanced), torch.enable_grad():
                yield
        except BaseException as error:
            if isinstance(error, DiskFull):
                fix = f"What was saved is whole. Free some space and continue with: {self._how_to_go_on}"
                error = DiskFull(error.path, fix)
            self._tell("run_failed", error=error)
            raise error

    @property
    def _how_to_go_on(self) -> str:
        return f"saekit run --resume {self.directory.path}"

    @property
    def _how_to_measure_again(self) -> str:
        return f"What failed is carried out again by: {self._how_to_go_on}"

    def _raise_failures(self, summary: dict[str, Any]) -> None:
        found = [(one.variant, error) for one in self.sae_runs for error in one.failed.values()]
        found += [("", error) for error in self.failed.values()]
        if found:
            told = [f"variant {variant!r}: {error}" if variant else str(error) for variant, error in found]
            again = f"Everything else is written. {self._how_to_measure_again}"
            error = type(found[0][1])("\n".join([*told, again]))
            error.summary = summary
            raise error

    def _phases(self) -> dict[str, Any]:
        self._begin()
        with self._phase("prepare", None):
            self.prepare()
        if self.plan.total_steps:
            with self._phase("train", self.plan.total_steps * self.config.training.batch_size):
                self._train()
        return self._trained()

    def _trained(self) -> dict[str, Any]:
        """Everything after training; returns the summary."""
        self.each(SAERun.save_sae)
        if any(one.plan.graph for one in self.sae_runs):
            with self._phase("graph", None):
                self.each(SAERun.build_graph)
        return self._measured()

    def _phases_again(self, before: dict[str, Any]) -> dict[str, Any]:
        self._begin()
        self.seconds = dict(before["seconds"])
        self.listeners.warnings += [message for message in before["warnings"] if message not in self.listeners.warnings]
        with self._phase("prepare", None):
            self._open(only_as=self.directory.provenance)
            self.each(lambda one: one.recall(before["variants"].get(one.variant, before)))
            self.each(SAERun.prepare_analyzers)
        self.trained_tokens = before["tokens"]
        kept_figures = ("tokens_per_second", "peak_memory_bytes")  # they tell of the training
        return self._measured({key: before[key] for key in kept_figures})

    def _begin(self) -> None:
        for one in self.sae_runs:
            one.directory.begin(one.config)
        self._tell("run_started")
        self.warn(*self.plan.warnings)
        self.each(lambda one: one.listeners.warn(*one.listeners.outdated))

    def _measured(self, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """Everything after the graph; returns the summary, with what is already `known` in it."""
        if known is None or any(one.to_do("metric") for one in self.sae_runs):
            with self._phase("evaluate", self.config.evaluation.tokens):
                self._evaluate()
        analyses = sum(len(one.to_do("analyzer")) for one in self.sae_runs)
        with self._phase("analyse", analyses + len(self.plan.comparisons)):
            self._analyse()
        self.directory.unseal()
        with self._phase("report", None):
            summary = to_jsonable(summarise(self)) | (known or {})
            for one in self.sae_runs:
                if one.variant:
                    write_json(one.directory.summary, summary["variants"][one.variant])
                    write_report(one.directory.path)
            write_json(self.directory.summary, summary)
            write_report(self.directory.path)
        summary["seconds"] = {k: round(v, 3) for k, v in self.seconds.items()}
        write_json(self.directory.summary, summary)
        self.directory.seal()
        self.each(
            lambda one: one.listeners.call(
                "run_finished", run=one.info, summary=summary["variants"].get(one.variant, summary)
            )
        )
        self.listeners.emit("run_finished", run=self.info, summary=summary)
        return summary

    def each(self, act: Callable[Concatenate[SAERun, P], object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Let every SAE do `act`, a method of `SAERun` or a function of one, in its turn."""
        for one in self.sae_runs:
            with one.turn():
                act(one, *args, **kwargs)

    def _tell(self, hook: str, **values: Any) -> None:
        """Call a hook that concerns the whole run: on the listeners of each SAE, then on those of the run itself."""
        self._tell_each(hook, **values)
        self.listeners.emit(hook, run=self.info, **values)

    def _tell_each(self, hook: str, **values: Any) -> None:
        self.each(lambda one: one.listeners.call(hook, run=one.info, **values))

    def _harvest_advanced(self, done: int, total: int) -> None:
        """Tell listeners how far the harvest of a block has come, at most once a second."""
        now = time.perf_counter()
        if now - self._harvest_told >= 1.0:
            self._harvest_told = now
            for one in self.sae_runs:  # not in its turn: when it is told depends on the clock, so it draws from no sequence
                one.listeners.call("harvest_advanced", done=done, total=total)
            self.listeners.emit("harvest_advanced", done=done, total=total)

    def warn(self, *messages: str) -> None:
        """Warnings that concern the whole run."""
        for message in messages:
            if message not in self.listeners.warnings:
                self.listeners.warn(message)
                self._tell_each("warned", message=message)

    # --- prepare -----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Open the source, and bring every SAE to its first weights."""
        self._open()
        self._initialise()

    def _initialise(self) -> None:
        """Bring every SAE to its first weights."""
        if self.plan.total_steps:
            sample = self._sample()
            self.each(SAERun.initialise, sample)
        self.each(SAERun.prepare_analyzers)

    def _open(self, only_as: Path | None = None) -> None:
        """Choose the device and open the source. only_as: UsageError if it is another one than this provenance tells of."""
        training = self.config.training

        def choose(one: SAERun) -> None:
            self.device = choose_device(training.device, one.config.training.precision)

        self.each(choose)
        if training.threads:
            torch.set_num_threads(training.threads)
        torch.manual_seed(seed_for(training.order_seed, "torch"))
        self.source: Source = self.plan.members[0].build_source()
        if hasattr(self.source, "push") and not self._is_fed:
            raise UsageError(
                f"source.use: {self.config.source.use!r} is fed by a program while that runs, so a run or a resume needs the "
                "program: use saekit.Online in it, or choose another source."
            )
        with under_key(self.plan.source.key), kept(self.plan.source.component.origin, self.warn):
            self.source.open(device=self.device, dtype=torch.float32)
        if isinstance(self.source, CachedSource) and (missing := self.source.missing):
            with self._phase("harvest", missing), under_key(self.plan.source.key):
                self.source.fill(lambda done: self._tell("phase_advanced", phase="harvest", done=done))
        self.warn(*getattr(self.source, "warnings", ()))
        self.identity = to_jsonable(self.source.identity())
        if only_as is not None and json.loads(only_as.read_text(encoding="utf-8"))["source"] != self.identity:
            raise UsageError(
                f"{only_as}: the SAE was trained on another model or other data than there is now. Bring back what the run was "
                "begun with, or start a new run."
            )
        self._write_provenance()
        self.each(SAERun.open, self.source, self.identity, self.device)

    def _write_provenance(self) -> None:
        made_by = {self.directory.provenance: provenance(self.plan, self.identity)}
        made_by |= {one.directory.provenance: provenance(one.plan, self.identity) for one in self.sae_runs}
        for path, content in made_by.items():
            write_json(path, with_resumption(path, content))

    def _sample(self) -> Sample:
        """The activations that decide every SAE's scale and first decoder bias."""
        training = self.config.training
        size = min(SCALE_SAMPLE, training.buffer)
        first = next(self.source.blocks("train", size=size, seed=training.order_seed), None)
        if first is None:
            raise RunError("the source gave no activations to train on. Give more data.")
        target = first.x if first.target is None else first.target
        for activations, place in ((first.x, "hook_point"), (target, "target_hook_point")):
            if not bool(torch.isfinite(activations).all()):
                raise RunError(
                    f"the activations of {self.plan.model} at {getattr(self.source, place, None)} are not finite. "
                    "Try another precision of the model, or another hook point."
                )
        scale, target_scale = (_unit_scale(t) if training.normalize else 1.0 for t in (first.x, target))
        return Sample(first, scale, target_scale)

    # --- train -------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        with contextlib.closing(self._start_training()), self._interruption.in_training():
            while self.number < self.plan.total_steps:
                self._step()
        self._end_training()

    def _start_training(self) -> ShuffledBatches:
        """Everything before the next step: the trainers, as in the newest checkpoint if there is one, and the batches from there
        on, which must be closed."""
        training = self.config.training
        self.number, position = self.begin_training()
        self._resumed_at = self._saved = self.number
        self._pooled = any(one.trainer.needs_sequences for one in self.sae_runs)
        self._batches = ShuffledBatches(
            self.source,
            batch_size=training.batch_size,
            block_size=getattr(self.source, "rows", training.buffer) if self._is_fed else training.buffer,
            seed=training.order_seed,
            prefetch=0 if self._is_fed else training.prefetch,  # nothing can be read ahead of the program that pushes
            position=position,
        )
        self._began = time.perf_counter()
        return self._batches

    def _end_training(self) -> None:
        """After the last step: free what only training needs, and let each SAE settle what it followed only on average."""
        self.each(SAERun.end_training)
        self.each(SAERun.settle)
        batch_size = self.config.training.batch_size
        self.trained_tokens = self.number * batch_size
        self.tokens_this_time = (self.number - self._resumed_at) * batch_size

    def begin_training(self) -> tuple[int, tuple[int, int]]:
        """Make the trainers, and restore the newest checkpoint if there is one; returns the number of the next step and the
        position in the data."""
        self.each(SAERun.make_trainer)
        number, position = self._restore()
        self.each(lambda one: one.listeners.emit("training_started", trainer=one.trainer))
        return number, position

    def _restore(self) -> tuple[int, tuple[int, int]]:
        state = self._newest_checkpoint()
        if state is None:
            return 0, (0, 0)
        with self._refusing_a_damaged_one():
            self.each(lambda one: one.listeners.warn(*state.warnings_of[one.variant]))
            self.warn(*state.warnings, *what_changed(state, plugins_used(self.plan)))
            self.each(SAERun.restore, state)
        return state.step, state.position

    def _newest_checkpoint(self) -> RunState | None:
        """The newest whole checkpoint. UsageError if it is one of another run."""
        found = RunState.newest(self.directory.checkpoints)
        if found is None:
            return None
        self._checkpoint_read, state, damaged = found
        self.warn(*(f"{warning} An older checkpoint is used." for warning in damaged))
        refuse_other(self._checkpoint_read, state.decisive, decisive(self.config, self.identity))
        return state

    @contextlib.contextmanager
    def _refusing_a_damaged_one(self) -> Iterator[None]:
        """UsageError if what the checkpoint that was read last holds cannot be taken back in the block."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise UsageError(
                f"{self._checkpoint_read}: is not a whole checkpoint of this run: {type(error).__name__}: {error}. Remove it, so "
                "that an older one is used, or start a new run."
            ) from error

    def _step(self) -> None:
        """One step: a batch is harvested once and given to every SAE in turn. A checkpoint is saved when one is due."""
        training, last, position = self.config.training, self.plan.total_steps, self._batches.position
        try:
            with self._interruption.waiting():
                batch, sequences = self._harvest(self.number, self._batches, self._pooled)
        except KeyboardInterrupt:  # a block may take minutes, and whoever asks a process to end seldom waits so long
            if self.number != self._saved:
                self._checkpoint(self.number, position)
            self._interruption.stop_if_asked(self.number, last)
            raise
        self.number += 1
        self.each(SAERun.train_on, batch, sequences, self._speed)
        self._tell("phase_advanced", phase="train", done=self.number * training.batch_size)
        if self.number % training.checkpoint_every == 0 or self.number == last or self._interruption.asked is not None:
            self._checkpoint(self.number, self._batches.position)
            self._saved = self.number
        self._interruption.stop_if_asked(self.number, last)

    def _speed(self) -> float:
        """Activations per second since training began or went on."""
        return (self.number - self._resumed_at) * self.config.training.batch_size / (time.perf_counter() - self._began)

    def _harvest(self, number: int, batches: ShuffledBatches, pooled: bool) -> tuple[Activations, SequenceBatch | None]:
        """The batch of step `number`; with `pooled` also its labelled sequences, the same whether or not the run was resumed."""
        training, waited = self.config.training, time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            raise RunError(
                f"the source ended after {number * training.batch_size} activations, but training.tokens asks for "
                f"{training.tokens}. Lower it, or give more data."
            )
        batch, sequences = batch.to(self.device), None
        if pooled:
            sequences = self.source.sequences("train", training.sequences, training.order_seed, number).to(self.device)
        self._add_seconds("harvest", time.perf_counter() - waited)
        return batch, sequences

    def _checkpoint(self, number: int, position: tuple[int, int]) -> None:
        """Save every SAE after `number` steps in one checkpoint: it is whole for all of them or for none."""
        state = RunState(
            step=number,
            position=position,
            decisive=decisive(self.config, self.identity),
            plugins=plugins_used(self.plan),
            threads=torch.get_num_threads(),
            warnings=self.listeners.warnings,
            warnings_of={one.variant: one.listeners.warnings for one in self.sae_runs},
        )
        self.each(lambda one: state.add(one.trainer))
        state.add_source(self.source)
        path = state.save(self.directory.checkpoints, self.config.training.keep_checkpoints)
        self.each(
            lambda one: one.listeners.emit("checkpoint_saved", trainer=one.trainer, number=number - 1, path=path)
        )

    # --- evaluate, analyse -------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Harvest the held-out activations once, and give each batch to the metrics of every SAE."""
        self.each(SAERun.begin_evaluation)
        done, use = 0, HeldOutUse()
        context = dataclasses.replace(self.sae_runs[0].context, warn=self.warn, use=use)  # the data concern every SAE
        with torch.no_grad():
            for batch in context.held_out_activations(self.config.evaluation.tokens):
                self.each(SAERun.evaluate_on, batch)
                done += len(batch)
                self._tell("phase_advanced", phase="evaluate", done=done)
        if done == 0:
            raise RunError("the held-out split gave no activations. Give more data, or a larger held_out share.")
        self.each(SAERun.end_evaluation, use)

    def _analyse(self) -> None:
        done = 0
        for one in self.sae_runs:
            for part in one.to_do("analyzer"):
                with one.turn():
                    one.analyse(part)
                done += 1
                self._tell("phase_advanced", phase="analyse", done=done)
        for part in self.plan.comparisons:
            compare(self, part)
            done += 1
            self._tell("phase_advanced", phase="analyse", done=done)

    # --- time ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _phase(self, name: str, total: int | None) -> Iterator[None]:
        self._tell("phase_started", phase=name, total=total)
        began, harvest_before = time.perf_counter(), self.seconds.get("harvest", 0.0)
        yield
        self.warn(*self.registry.warnings)
        waited = self.seconds.get("harvest", 0.0) - harvest_before
        self._add_seconds(name, time.perf_counter() - began - waited)
        self._tell("phase_ended", phase=name, seconds=self.seconds[name])

    def _add_seconds(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @property
    def peak_memory(self) -> int:
        """The most memory this process has held, in bytes (on the CUDA device, if it trains there)."""
        return peak_memory(self.device)


def _unit_scale(activations: torch.Tensor) -> float:
    """The factor that brings activations [n, d] to a mean norm of sqrt(d); 1 if they are all zero."""
    mean_norm = float(activations.norm(dim=1).mean())
    return activations.shape[1] ** 0.5 / mean_norm if mean_norm > 0 else 1.0


def show_finished(directory: RunDirectory, summary: dict[str, Any], view: Any) -> None:
    """Let the view show the summary of a run that was finished before, and write its report if that is not there."""
    if not directory.report.is_file():
        write_report(directory.path)
    if not directory.checksums.is_file():
        directory.seal()
    listeners = Listeners()
    if view is not None:
        listeners.add(Listener("view", view, "the terminal view", vital=False))
    listeners.warn(*directory.changed())
    listeners.emit("run_finished", run=None, summary=summary)
