"""The conductor: plan -> prepare -> train -> evaluate -> analyse -> report, each phase a short method."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from saekit.activations.shuffle import ShuffledBatches
from saekit.errors import Interrupted, RunError, UsageError
from saekit.files import DiskFull, disk_errors, plain, write_json
from saekit.listeners import Listener, Listeners
from saekit.plugins import Registry
from saekit.report import write_report
from saekit.result import Result
from saekit.runner.blame import blamed_on, explained
from saekit.runner.context import RunContext
from saekit.runner.directory import RunDirectory
from saekit.runner.hardware import choose_device, peak_memory
from saekit.runner.plan import Plan
from saekit.runner.provenance import plugins_used, provenance, with_resumption
from saekit.runner.summary import summarise
from saekit.sae.base import SparseAutoencoder
from saekit.sae.formats import SavedSAE, load_sae, open_sae, save_sae
from saekit.training import checkpoint
from saekit.training.losses import Term
from saekit.training.trainer import Trainer, seed_for

SCALE_SAMPLE = 16_384  # activations that decide the scale and the initial bias: enough for three digits


class Run:
    """One run: a plan carried out in a directory.

    plan, directory: what and where. metrics: held-out metrics once evaluated. analysis: each analyzer's scalars.
    seconds: duration of each phase so far.
    """

    def __init__(
        self, plan: Plan, directory: RunDirectory, registry: Registry, *, resumed: bool = False, view: Any = None
    ) -> None:
        self.plan, self.directory, self.registry, self.resumed = plan, directory, registry, resumed
        self.config = plan.config
        self.metrics: dict[str, float | None] = {}
        self.headline: list[str] = []
        self.meanings: dict[str, str] = {}
        self.analysis: dict[str, dict[str, Any]] = {}
        self.losses: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.trained_tokens = self.tokens_this_time = 0
        self.listeners = Listeners()
        self._stop_asked = self._in_loop = False
        for part in (*plan.callbacks, *plan.trackers):
            vital = part.component.kind == "callback"
            self.listeners.add(Listener(part.key, part.build(), part.component.origin, vital))
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
            self.listeners.emit("run_failed", run=self, error=error)
            raise error

    def _phases(self) -> dict[str, Any]:
        self.listeners.emit("run_started", run=self)
        for warning in self.plan.warnings:
            self.listeners.warn(warning)
        with self._phase("prepare", None):
            self._prepare()
        if self.plan.total_steps:
            with self._phase("train", self.plan.total_steps * self.config.training.batch_size):
                self._train()
        self._save_sae()
        with self._phase("evaluate", self.config.evaluation.tokens):
            self._evaluate()
        with self._phase("analyse", len(self.plan.analyzers)):
            self._analyse()
        with self._phase("report", None):
            summary = plain(summarise(self))
            write_json(self.directory.summary, summary)
            write_report(self.directory.path)
        summary["seconds"] = {k: round(v, 3) for k, v in self.seconds.items()}
        write_json(self.directory.summary, summary)
        self.listeners.emit("run_finished", run=self, summary=summary)
        return summary

    # --- prepare -----------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        training = self.config.training
        self.device = choose_device(training.device, training.precision)
        if training.threads:
            torch.set_num_threads(training.threads)
        torch.manual_seed(seed_for(training.seed, "torch"))
        self.source = self.plan.build_source()
        self.source.open(device=self.device, dtype=torch.float32)
        missing = getattr(self.source, "missing", 0)  # of a cache
        if missing:
            with self._phase("harvest", missing):
                self.source.fill(lambda done: self.listeners.emit("phase_advanced", phase="harvest", done=done))
        for warning in getattr(self.source, "warnings", ()):
            self.listeners.warn(warning)
        self.identity = plain(self.source.identity())
        made_by = provenance(self.plan, self.identity)
        write_json(self.directory.provenance, with_resumption(self.directory.provenance, made_by))
        self.sae, self.scale = self._initial_sae()

    def _initial_sae(self) -> tuple[SparseAutoencoder, float]:
        """The SAE before its first step, and the factor that brings activations to a mean norm of sqrt(d_in)."""
        entry = self.config.architecture
        if entry.from_ is not None:
            sae = self._fitting(open_sae(entry.from_, registry=self.registry)).requires_grad_(True)
            if not self.plan.total_steps:
                return sae.to(self.device), 1.0
        else:
            sae = self.plan.architecture.build(self.source.d_in, entry.d_sae, self.source.d_out)
        training = self.config.training
        first = next(self.source.blocks("train", size=min(SCALE_SAMPLE, training.buffer), seed=training.seed), None)
        if first is None:
            raise RunError("the source gave no activations to train on. Give more data.")
        if not bool(torch.isfinite(first.x).all()):
            raise RunError(
                f"the activations of {self.plan.model} at {self.source.hook_point} are not finite. "
                "Try another precision of the model, or another hook point."
            )
        mean_norm = float(first.x.norm(dim=1).mean())
        scale = sae.d_in**0.5 / mean_norm if training.normalize and mean_norm > 0 else 1.0
        if entry.from_ is not None:
            sae.rescale(1.0 / scale)
        else:
            target = first.x if first.target is None else first.target
            generator = torch.Generator().manual_seed(seed_for(training.seed, "weights"))
            sae.initialise(generator, (target * scale).cpu())
        sae.constrain_weights()
        return sae.to(self.device), scale

    def _fitting(self, saved: SavedSAE) -> SparseAutoencoder:
        """The SAE to start from; UsageError where source or run file ask for another one."""
        entry, sae = self.config.architecture, saved.sae
        if saved.name != self.plan.architecture.component.qualified_name:
            raise UsageError(
                f"architecture.use: {entry.use}, but the SAE in {entry.from_} is a {saved.name}. "
                f'Write use = "{saved.name}".'
            )
        if sae.d_in != self.source.d_in:
            raise UsageError(
                f"architecture.from: the SAE in {entry.from_} reads width {sae.d_in}, but {self.plan.model} has width "
                f"{self.source.d_in} at {self.source.hook_point}. Choose the hook point that it was trained on."
            )
        if sae.d_out != self.source.d_out:
            raise UsageError(
                f"architecture.from: the SAE in {entry.from_} rebuilds width {sae.d_out}, but the source asks for width "
                f"{self.source.d_out}. Choose the source that it was trained on."
            )
        if entry.d_sae not in (None, sae.d_sae):
            raise UsageError(
                f"architecture.d_sae: {entry.d_sae}, but the SAE in {entry.from_} has {sae.d_sae} latents. Leave d_sae out."
            )
        for key in entry.options.keys() & sae.options().keys():
            if self.plan.architecture.options[key] != sae.options()[key]:
                raise UsageError(
                    f"architecture.{key}: {entry.options[key]!r}, but the SAE in {entry.from_} was made with "
                    f"{sae.options()[key]!r}. Leave {key} out."
                )
        return sae

    # --- train -------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        trainer, position = self._trainer()
        started_at = trainer.tokens
        self.listeners.emit("training_started", trainer=trainer)
        training = self.config.training
        batches = ShuffledBatches(
            self.source,
            batch_size=training.batch_size,
            block_size=training.buffer,
            seed=training.seed,
            prefetch=training.prefetch,
            position=position,
        )
        with contextlib.closing(batches):
            self._in_loop = True
            self._loop(trainer, batches)
            self._in_loop = False
        self.losses = {k.removeprefix("loss/"): v for k, v in trainer.last_logged.items() if k.startswith("loss/")}
        self.trained_tokens = trainer.tokens
        self.tokens_this_time = trainer.tokens - started_at

    def _trainer(self) -> tuple[Trainer, tuple[int, int]]:
        context = self._context(self.directory.path, self.scale)
        terms = []
        for part in self.plan.losses:
            function = part.build()
            if isinstance(function, torch.nn.Module):
                function.to(self.device)
            if hasattr(function, "prepare"):
                function.prepare(context)
            terms.append(Term(part.label, function, part.entry.weight, part.component))  # type: ignore[attr-defined]
        trainer = Trainer(
            self.sae,
            terms,
            self.config.training,
            total_steps=self.plan.total_steps,
            scale=self.scale,
            device=self.device,
            listeners=self.listeners,
        )
        path, tensors, state, warnings = checkpoint.newest_whole(self.directory.checkpoints)
        for warning in warnings:
            self.listeners.warn(f"{warning} An older checkpoint is used.")
        if path is None:
            return trainer, (0, 0)
        checkpoint.refuse_other(path, state, checkpoint.decisive(self.config, self.identity))
        self._say_what_changed(state)
        trainer.load_state(state["step"], tensors, state["trainer"])
        self.scale = trainer.scale = state["trainer"]["scale"]
        return trainer, (state["position"][0], state["position"][1])

    def _say_what_changed(self, state: dict[str, Any]) -> None:
        """Warn of what may move the last bits of the weights, and repeat what the run had warned of before."""
        for warning in state["warnings"]:
            self.listeners.warn(warning)
        if state["threads"] != torch.get_num_threads():
            self.listeners.warn(
                f"The run was begun with {state['threads']} CPU threads and goes on with {torch.get_num_threads()}: its "
                "weights may differ in the last digits from those of a run that was not interrupted."
            )
        now_used = {plugin["name"]: plugin for plugin in plugins_used(self.plan)}
        for was in state["plugins"]:
            now = now_used.get(was["name"], was)
            if was != now:
                self.listeners.warn(
                    f"Plugin {now['name']!r} has changed since the run was begun: it was {was['distribution']} "
                    f"{was['version']} and is {now['distribution']} {now['version']}."
                )

    def _loop(self, trainer: Trainer, batches: ShuffledBatches) -> None:
        training, last = self.config.training, self.plan.total_steps
        began, first = time.perf_counter(), trainer.number
        while trainer.number < last:
            waited = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                raise RunError(
                    f"the source ended after {trainer.tokens} activations, but training.tokens asks for "
                    f"{self.config.training.tokens}. Lower it, or give more data."
                )
            batch = batch.to(self.device)
            self._add_seconds("harvest", time.perf_counter() - waited)
            trainer.train_on(batch)
            number = trainer.number
            if number % training.log_every == 0 or number == last:
                values = trainer.measures()
                speed = (number - first) * training.batch_size / (time.perf_counter() - began)
                trainer.last_logged = {**values, "tokens_per_second": speed}
                self.listeners.emit("logged", trainer=trainer, number=number - 1, values=trainer.last_logged)
            self.listeners.emit("phase_advanced", phase="train", done=trainer.tokens)
            if number % training.checkpoint_every == 0 or number == last or self._stop_asked:
                self._checkpoint(trainer, batches.position)
            if self._stop_asked:
                raise Interrupted(
                    f"interrupted after step {number} of {last}; a checkpoint is saved. "
                    f"Continue with: saekit run --resume {self.directory.path}"
                )

    def _checkpoint(self, trainer: Trainer, position: tuple[int, int]) -> None:
        tensors, values = trainer.state()
        state = {
            "trainer": values,
            "position": list(position),
            "decisive": checkpoint.decisive(self.config, self.identity),
            "plugins": plugins_used(self.plan),
            "threads": torch.get_num_threads(),
            "warnings": self.listeners.warnings,
        }
        path = checkpoint.save(
            self.directory.checkpoints, trainer.number, tensors, state, self.config.training.keep_checkpoints
        )
        self.listeners.emit("checkpoint_saved", trainer=trainer, number=trainer.number, path=path)

    def _save_sae(self) -> None:
        """Write `sae/` in the units of the raw activations, and go on with exactly what stands there."""
        self.sae.rescale(self.scale)
        metadata = {
            "model_name": self.identity.get("model"),
            "hook_name": self.source.hook_point,
            "hook_name_out": getattr(self.source, "target_hook_point", None),
            "context_size": self.identity.get("context"),
            "prepend_bos": self.identity.get("bos"),
        }
        name = self.plan.architecture.component.qualified_name
        save_sae(self.sae, self.directory.sae, name=name, metadata={k: v for k, v in metadata.items() if v is not None})
        self.sae = load_sae(self.directory.sae, device=self.device, registry=self.registry)

    # --- evaluate, analyse -------------------------------------------------------------------------------------

    def _context(self, directory: Path, scale: float = 1.0) -> RunContext:
        return RunContext(self.sae, self.source, self.config, self.device, directory, self.listeners.warn, scale)

    def _evaluate(self) -> None:
        self.sae.requires_grad_(False)
        context = self._context(self.directory.path)
        built = [(part, part.build()) for part in self.plan.metrics]
        streaming = [(part, metric) for part, metric in built if hasattr(metric, "update")]
        for part, metric in built:
            if hasattr(metric, "prepare"):
                with blamed_on(part):
                    metric.prepare(context)
        done = 0
        for step in context.held_out():
            for part, metric in streaming:
                with blamed_on(part):
                    metric.update(step)
            done += len(step.code)
            self.listeners.emit("phase_advanced", phase="evaluate", done=done)
        if done == 0:
            raise RunError("the held-out split gave no activations. Give more data, or a larger held_out share.")
        for part, metric in built:
            with blamed_on(part):
                values = metric.compute() if hasattr(metric, "update") else metric.measure(context)
                self.metrics |= {name: None if v is None else float(v) for name, v in values.items()}
            self.headline += [name for name in getattr(metric, "headline", ()) if name in values]
            self.meanings |= getattr(metric, "meanings", {})
        self.listeners.emit("evaluated", metrics=self.metrics)

    def _analyse(self) -> None:
        for done, part in enumerate(self.plan.analyzers, start=1):
            directory = self.directory.analysis(part.label)
            with disk_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)
            analyzer = part.build()
            with blamed_on(part):
                result = analyzer(self._context(directory))
                if not isinstance(result, Result):
                    raise TypeError(f"it returned {type(result).__name__}, not a saekit.Result")
                self.directory.write_analysis(part.label, result)
                self.analysis[part.label] = plain(dict(result.scalars))
            self.listeners.emit("analysed", name=part.label, result=result)
            self.listeners.emit("phase_advanced", phase="analyse", done=done)

    # --- time and interruption ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _phase(self, name: str, total: int | None) -> Iterator[None]:
        self.listeners.emit("phase_started", phase=name, total=total)
        began, harvest_before = time.perf_counter(), self.seconds.get("harvest", 0.0)
        yield
        waited = self.seconds.get("harvest", 0.0) - harvest_before
        self._add_seconds(name, time.perf_counter() - began - waited)
        self.listeners.emit("phase_ended", phase=name, seconds=self.seconds[name])

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


def show_finished(directory: RunDirectory, summary: dict[str, Any], view: Any) -> None:
    """Let the view show the summary of a run that was finished before, and write its report if that is not there."""
    if not directory.report.is_file():
        write_report(directory.path)
    listeners = Listeners()
    if view is not None:
        listeners.add(Listener("view", view, "the terminal view", vital=False))
    listeners.emit("run_finished", run=None, summary=summary)
