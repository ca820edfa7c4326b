"""The conductor: plan -> prepare -> train -> evaluate -> analyse -> report, each phase a short method.

The activations, the phases, the checkpoint and the clock are the run's; what each SAE does with a batch is its `SAERun`'s.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

from saekit.activations.batch import SequenceBatch
from saekit.activations.shuffle import ShuffledBatches
from saekit.errors import Interrupted, RunError, under_key
from saekit.files import DiskFull, to_jsonable, write_json
from saekit.listeners import Listener, Listeners
from saekit.plugins import Registry
from saekit.report import write_report
from saekit.run_directory import RunDirectory
from saekit.runner.blame import explained
from saekit.runner.hardware import choose_device, peak_memory
from saekit.runner.sae_run import SAERun, Sample
from saekit.runner.plan import RunPlan
from saekit.runner.provenance import plugins_used, provenance, with_resumption
from saekit.runner.summary import summarise
from saekit.seeds import seed_for
from saekit.training import checkpoint

SCALE_SAMPLE = 16_384  # activations that decide the scale and the initial bias: enough for three digits


class Run:
    """One run: a plan carried out in a directory.

    plan, directory: what and where. members: the SAEs that it trains, each given every batch. seconds: duration of each
    phase so far.
    """

    def __init__(
        self, plan: RunPlan, directory: RunDirectory, registry: Registry, *, resumed: bool = False, view: Any = None
    ) -> None:
        self.plan, self.directory, self.resumed = plan, directory, resumed
        self.config = plan.config
        self.seconds: dict[str, float] = {}
        self.trained_tokens = self.tokens_this_time = 0
        self.listeners = Listeners()
        self._stop_asked = self._in_loop = False
        self.members = [SAERun(p, directory.of_variant(p.variant), registry, self.listeners) for p in plan.members]
        if view is not None:
            self.listeners.add(Listener("view", view, "the terminal view", vital=False))

    def execute(self) -> dict[str, Any]:
        """Carry the plan out; returns what `summary.json` holds. Listeners hear of failures before they are raised."""
        try:
            with self._interruptible(), explained(self.plan.parts):
                return self._phases()
        except BaseException as error:
            if isinstance(error, DiskFull):
                fix = f"What was saved is whole. Free some space and continue with: saekit run --resume {self.directory.path}"
                error = DiskFull(error.path, fix)
            self._tell("run_failed", error=error)
            raise error

    def _phases(self) -> dict[str, Any]:
        for member in self.members:
            member.directory.begin(member.config)
        self._tell("run_started")
        for warning in self.plan.warnings:
            self._warn(warning)
        for member in self.members:
            with member.turn():
                for warning in member.listeners.outdated:
                    member.listeners.warn(warning)
        with self._phase("prepare", None):
            self.prepare()
        if self.plan.total_steps:
            with self._phase("train", self.plan.total_steps * self.config.training.batch_size):
                self._train()
        for member in self.members:
            with member.turn():
                member.save_sae()
        if any(member.plan.graph for member in self.members):
            with self._phase("graph", None):
                self._build_graphs()
        with self._phase("evaluate", self.config.evaluation.tokens):
            self._evaluate()
        with self._phase("analyse", sum(len(member.plan.analyzers) for member in self.members)):
            self._analyse()
        with self._phase("report", None):
            summary = to_jsonable(summarise(self))
            for member in self.members:
                if member.variant:
                    write_json(member.directory.summary, summary["variants"][member.variant])
                    write_report(member.directory.path)
            write_json(self.directory.summary, summary)
            write_report(self.directory.path)
        summary["seconds"] = {k: round(v, 3) for k, v in self.seconds.items()}
        write_json(self.directory.summary, summary)
        for member in self.members:
            with member.turn():
                own = summary["variants"].get(member.variant, summary)
                member.listeners.call("run_finished", run=member, summary=own)
        self.listeners.emit("run_finished", run=self, summary=summary)
        return summary

    def _tell(self, hook: str, **values: Any) -> None:
        """Call a hook that is of the whole run: on each member's listeners, then on those of the run itself."""
        for member in self.members:
            with member.turn():
                member.listeners.call(hook, run=member, **values)
        self.listeners.emit(hook, run=self, **values)

    def _warn(self, message: str) -> None:
        """A warning that is of no one member."""
        if message not in self.listeners.warnings:
            self.listeners.warn(message)
            for member in self.members:
                with member.turn():
                    member.listeners.call("warned", message=message)

    # --- prepare -----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Open the source, and bring every member's SAE to its first weights."""
        training = self.config.training
        for member in self.members:
            with member.turn():
                self.device = choose_device(training.device, member.config.training.precision)
        if training.threads:
            torch.set_num_threads(training.threads)
        torch.manual_seed(seed_for(training.order_seed, "torch"))
        self.source = self.plan.members[0].build_source()
        with under_key(self.plan.source.key):
            self.source.open(device=self.device, dtype=torch.float32)
        missing = getattr(self.source, "missing", 0)  # of a cache
        if missing:
            with self._phase("harvest", missing), under_key(self.plan.source.key):
                self.source.fill(lambda done: self._tell("phase_advanced", phase="harvest", done=done))
        for warning in getattr(self.source, "warnings", ()):
            self._warn(warning)
        self.identity = to_jsonable(self.source.identity())
        self._write_provenance()
        for member in self.members:
            with member.turn():
                member.open(self.source, self.identity, self.device)
            member.seed()
        if self.plan.total_steps:
            sample = self._sample()
            for member in self.members:
                with member.turn():
                    member.initialise(sample)
        for member in self.members:
            with member.turn():
                member.prepare_analyzers()

    def _write_provenance(self) -> None:
        made_by = {self.directory.provenance: provenance(self.plan, self.identity)}
        made_by |= {m.directory.provenance: provenance(m.plan, self.identity) for m in self.members}
        for path, content in made_by.items():
            write_json(path, with_resumption(path, content))

    def _sample(self) -> Sample:
        """The activations that decide every member's scale and first decoder bias."""
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
        training = self.config.training
        number, position = self.begin_training()
        batches = ShuffledBatches(
            self.source,
            batch_size=training.batch_size,
            block_size=training.buffer,
            seed=training.order_seed,
            prefetch=training.prefetch,
            position=position,
        )
        with contextlib.closing(batches):
            self._in_loop = True
            self._loop(number, batches)
            self._in_loop = False
        for member in self.members:
            member.end_training()
        self.trained_tokens = self.plan.total_steps * training.batch_size
        self.tokens_this_time = self.trained_tokens - number * training.batch_size

    def begin_training(self) -> tuple[int, tuple[int, int]]:
        """Make the trainers, as the newest checkpoint has them where there is one; gives the number of the next step and
        the position in the data."""
        for member in self.members:
            with member.turn():
                member.make_trainer()
        number, position = self._restore()
        for member in self.members:
            with member.turn():
                member.listeners.emit("training_started", trainer=member.trainer)
        return number, position

    def _restore(self) -> tuple[int, tuple[int, int]]:
        path, tensors, state, warnings = checkpoint.newest_whole(self.directory.checkpoints)
        for warning in warnings:
            self._warn(f"{warning} An older checkpoint is used.")
        if path is None:
            return 0, (0, 0)
        checkpoint.refuse_other(path, state, checkpoint.decisive(self.config, self.identity))
        self._say_what_changed(state)
        for member in self.members:
            with member.turn():
                member.restore(state["step"], tensors, state["trainer"])
        return state["step"], (state["position"][0], state["position"][1])

    def _say_what_changed(self, state: dict[str, Any]) -> None:
        """Warn of what may move the last bits of the weights, and repeat what the run had warned of before."""
        for member in self.members:
            with member.turn():
                for warning in state["warnings_of"][member.variant]:
                    member.listeners.warn(warning)
        for warning in state["warnings"]:
            self._warn(warning)
        if state["threads"] != torch.get_num_threads():
            self._warn(
                f"The run was begun with {state['threads']} CPU threads and goes on with {torch.get_num_threads()}: its "
                "weights may differ in the last digits from those of a run that was not interrupted."
            )
        now_used = {plugin["name"]: plugin for plugin in plugins_used(self.plan)}
        for was in state["plugins"]:
            now = now_used.get(was["name"], was)
            if was != now:
                self._warn(
                    f"Plugin {now['name']!r} has changed since the run was begun: it was {was['distribution']} "
                    f"{was['version']} and is {now['distribution']} {now['version']}."
                )

    def _loop(self, number: int, batches: ShuffledBatches) -> None:
        """Train from step `number` on: each batch is harvested once and given to every member in turn."""
        training, last = self.config.training, self.plan.total_steps
        began, first = time.perf_counter(), number
        pooled = any(member.trainer.needs_sequences for member in self.members)

        def speed() -> float:
            return (number - first) * training.batch_size / (time.perf_counter() - began)

        while number < last:
            waited = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                raise RunError(
                    f"the source ended after {number * training.batch_size} activations, but training.tokens asks for "
                    f"{training.tokens}. Lower it, or give more data."
                )
            batch = batch.to(self.device)
            self._add_seconds("harvest", time.perf_counter() - waited)
            sequences = self._sequences(number) if pooled else None
            number += 1
            for member in self.members:
                with member.turn():
                    member.train_on(batch, sequences, speed)
            self._tell("phase_advanced", phase="train", done=number * training.batch_size)
            if number % training.checkpoint_every == 0 or number == last or self._stop_asked:
                self._checkpoint(number, batches.position)
            if self._stop_asked:
                raise Interrupted(
                    f"interrupted after step {number} of {last}; a checkpoint is saved. "
                    f"Continue with: saekit run --resume {self.directory.path}"
                )

    def _sequences(self, number: int) -> SequenceBatch:
        """The labelled sequences of step `number`, the same whether the run was interrupted or not."""
        training, waited = self.config.training, time.perf_counter()
        sequences = self.source.sequences("train", training.sequences, training.order_seed, number).to(self.device)
        self._add_seconds("harvest", time.perf_counter() - waited)
        return sequences

    def _checkpoint(self, number: int, position: tuple[int, int]) -> None:
        """Save every member after `number` steps, in one checkpoint: it is whole for all of them or for none."""
        tensors: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for member in self.members:
            with member.turn():
                own_tensors, own_values = member.state()
                tensors |= own_tensors
                values |= own_values
        state = {
            "trainer": values,
            "position": list(position),
            "decisive": checkpoint.decisive(self.config, self.identity),
            "plugins": plugins_used(self.plan),
            "threads": torch.get_num_threads(),
            "warnings": self.listeners.warnings,
            "warnings_of": {member.variant: member.listeners.warnings for member in self.members},
        }
        keep = self.config.training.keep_checkpoints
        path = checkpoint.save(self.directory.checkpoints, number, tensors, state, keep)
        for member in self.members:
            with member.turn():
                member.listeners.emit("checkpoint_saved", trainer=member.trainer, number=number, path=path)

    # --- graph, evaluate, analyse ------------------------------------------------------------------------------

    def _build_graphs(self) -> None:
        for member in self.members:
            if member.plan.graph:
                with member.turn():
                    member.build_graph()

    def _evaluate(self) -> None:
        """Harvest the held-out activations once, and give each batch to the metrics of every member."""
        for member in self.members:
            with member.turn():
                member.begin_evaluation()
        done = 0
        with torch.no_grad():
            for batch in self.members[0].context.held_out_activations(self.config.evaluation.tokens):
                for member in self.members:
                    with member.turn():
                        member.evaluate_on(batch)
                done += len(batch)
                self._tell("phase_advanced", phase="evaluate", done=done)
        if done == 0:
            raise RunError("the held-out split gave no activations. Give more data, or a larger held_out share.")
        for member in self.members:
            with member.turn():
                member.end_evaluation()

    def _analyse(self) -> None:
        done = 0
        for member in self.members:
            for part in member.plan.analyzers:
                with member.turn():
                    member.analyse(part)
                done += 1
                self._tell("phase_advanced", phase="analyse", done=done)

    # --- time and interruption ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _phase(self, name: str, total: int | None) -> Iterator[None]:
        self._tell("phase_started", phase=name, total=total)
        began, harvest_before = time.perf_counter(), self.seconds.get("harvest", 0.0)
        yield
        waited = self.seconds.get("harvest", 0.0) - harvest_before
        self._add_seconds(name, time.perf_counter() - began - waited)
        self._tell("phase_ended", phase=name, seconds=self.seconds[name])

    def _add_seconds(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @property
    def peak_memory(self) -> int:
        """The most memory this process has held, in bytes (on the CUDA device, if it trains there)."""
        return peak_memory(self.device)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C in training ends the step, saves a checkpoint and stops; elsewhere, or pressed twice, it stops at once."""

        def ask(signum: int, frame: Any) -> None:
            if self._stop_asked or not self._in_loop:
                raise KeyboardInterrupt
            self._stop_asked = True

        try:
            before = signal.signal(signal.SIGINT, ask)
        except ValueError:  # not in the main thread, where a signal never arrives
            yield
            return
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted. What was saved is kept; continue with: saekit run --resume {self.directory.path}"
            ) from None
        finally:
            signal.signal(signal.SIGINT, before)


def _unit_scale(activations: torch.Tensor) -> float:
    """The factor that brings activations [n, d] to a mean norm of sqrt(d); 1 where they are all zero."""
    mean_norm = float(activations.norm(dim=1).mean())
    return activations.shape[1] ** 0.5 / mean_norm if mean_norm > 0 else 1.0


def show_finished(directory: RunDirectory, summary: dict[str, Any], view: Any) -> None:
    """Let the view show the summary of a run that was finished before, and write its report if that is not there."""
    if not directory.report.is_file():
        write_report(directory.path)
    listeners = Listeners()
    if view is not None:
        listeners.add(Listener("view", view, "the terminal view", vital=False))
    listeners.emit("run_finished", run=None, summary=summary)
