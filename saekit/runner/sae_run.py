"""`SAERun`: one SAE's part of a run, from its first weights to its analyses. A run has one, or one for each variant."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saekit.activations.batch import Activations, SequenceBatch
from saekit.activations.trained_positions import TrainedPositions
from saekit.component_option import fits
from saekit.errors import PluginError, RunError, SaekitError, UsageError, under_key
from saekit.estimate import Estimate, value_of
from saekit.files import DiskFull, disk_errors, to_jsonable
from saekit.graph import FeatureGraph, dictionary_digest
from saekit.listeners import Listener, Listeners
from saekit.numerics import seeded
from saekit.plugins import Registry
from saekit.process_state import kept
from saekit.protocols import RunInfo, Source
from saekit.result import Result
from saekit.runner.blame import alone, blamed_on, explained, of_variant
from saekit.runner.context import RunContext
from saekit.runner.held_out import CountedSource, HeldOutUse
from saekit.runner.plan import Part, SAEPlan
from saekit.runner.unchanged import Unchanged
from saekit.sae.base import SparseAutoencoder
from saekit.sae.code import Code
from saekit.sae.formats import SavedSAE, load_sae, open_sae, save_sae
from saekit.seeds import seed_for
from saekit.training.loss_terms import Term
from saekit.training.randomness import OwnRandomness
from saekit.training.state import RunState
from saekit.training.trainer import Trainer

CALIBRATION_SAMPLE = 16_384  # training activations: enough that the mean L0 of others is within about 1% of theirs


@dataclass(frozen=True)
class Sample:
    """Some activations as the source gives them, and the factors that training applies.

    scale: brings `x` to a mean norm of sqrt(d_in).
    target_scale: brings what is rebuilt to one of sqrt(d_out). Both are 1 without `training.normalize`.
    """

    activations: Activations
    scale: float
    target_scale: float


class SAERun:
    """One SAE's part of a run: its plan, directory, listeners, losses, optimiser, random numbers and metrics.

    The run owns the data and hands it over. Whatever an SAE does is done in its `turn`.

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
    identity: dict[str, Any]
    sae: SparseAutoencoder
    trainer: Trainer

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
        self.last_speed: float | None = None  # as last logged, which may have been before the run was resumed
        self.calibrated: dict[str, float] = {}
        self.scale = self.target_scale = 1.0
        self.listeners = Listeners(above, f"variant {self.variant!r}: " if self.variant else "")
        self._draws: OwnRandomness | None = None
        self._is_new = plan.config.architecture.from_ is None  # whether its `prepare` is still to come
        self._metrics: list[tuple[Part, Any]] = []
        self._use: dict[str, HeldOutUse] = {}
        self._again: set[str] | None = None  # the keys of what is measured again; None in a run from the beginning
        self._prepared: dict[str, Any] = {}  # analyzers that have been prepared before training, by their key
        with of_variant(self.variant):
            for part in (*plan.sections["callback"], *plan.sections["tracker"]):
                vital = part.component.kind == "callback"
                self.listeners.add(Listener(part.key, part.build(), part.component.origin, vital))

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """This SAE is at work in the block: random numbers come from its own sequence, and errors name it."""
        with of_variant(self.variant), explained(self.plan.parts):
            if self._draws is None:
                yield
            else:
                with self._draws.drawing():
                    yield

    # --- prepare -----------------------------------------------------------------------------------------------

    def open(self, source: Source, identity: dict[str, Any], device: torch.device) -> None:
        """Take over the opened source, and load the SAE that the run file starts from, if it names one.

        From the next turn on, what is drawn from torch's global generators is a sequence that belongs to this SAE."""
        self.source, self.identity, self.device = source, identity, device
        entry = self.config.architecture
        if entry.from_ is not None:
            self.sae = self._fitting(open_sae(entry.from_, registry=self.registry)).requires_grad_(True).to(device)
            if self.sae.trained_positions.first is None:  # nobody knows, so the run's own source says what to look at
                self.sae.trained_positions = self._positions()
        self._draws = OwnRandomness(seed_for(self.config.training.seed, "torch"), device)

    def initialise(self, sample: Sample) -> None:
        """The SAE before its first step, for activations times `sample.scale`."""
        entry, first = self.config.architecture, sample.activations
        self.scale, self.target_scale = sample.scale, sample.target_scale
        if entry.from_ is not None:
            sae = self.sae
            self._refuse_another_task(sae, rebuilds_other=first.target is not None)
            sae.unscale(1.0 / self.scale, 1.0 / self.target_scale)
        else:
            d_out = None if first.target is None else self.source.d_out  # given for a transcoder alone
            sae = self.plan.architecture.build(self.source.d_in, entry.d_sae, d_out)
            target = first.x if first.target is None else first.target
            generator = torch.Generator().manual_seed(seed_for(self.config.training.seed, "weights"))
            sae.initialise(generator, (target * self.target_scale).cpu())
            sae.options()  # raises now, rather than after training, if the SAE could not be saved
        sae.constrain_weights()
        sae.trained_positions = self._positions()
        self.sae = sae.to(self.device)

    def _positions(self) -> TrainedPositions:
        return TrainedPositions.of_source(self.identity, getattr(self.source, "special_tokens", ()))

    def _refuse_another_task(self, sae: SparseAutoencoder, *, rebuilds_other: bool) -> None:
        """UsageError if an SAE to train further was made for another task: it rebuilds what it reads and the source asks for
        another site, or it has a linear path and the source asks for what it reads."""
        where = f"architecture.from: the SAE in {self.config.architecture.from_}"
        if rebuilds_other and sae.reads_centred:
            raise UsageError(
                f"{where} takes b_dec from its input: it rebuilds what it reads, but the source asks for another site. "
                "Start from a transcoder, or leave architecture.from out."
            )
        if not rebuilds_other and sae.skip:
            raise UsageError(
                f"{where} has a linear path (skip), but the source asks it to rebuild what it reads: the path would learn "
                "the identity. Name the other site, for example with source.target_hook_point."
            )

    def _fitting(self, saved: SavedSAE) -> SparseAutoencoder:
        """The SAE to start from; UsageError if it does not fit the source or the run file."""
        entry, sae = self.config.architecture, saved.sae
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
        if saved.name != self.plan.architecture.component.qualified_name:
            sae = self._built_on(saved)
        if entry.d_sae not in (None, sae.d_sae):
            raise UsageError(
                f"architecture.d_sae: {entry.d_sae}, but it is {sae.d_sae} from the SAE in {entry.from_}. Leave d_sae out."
            )
        # options() leaves out what an SAE can do without, such as a linear path
        made_with = {name: getattr(sae, name) for name in entry.options if hasattr(sae, name)} | sae.options()
        for key in entry.options.keys() & made_with.keys():
            if not fits(self.plan.architecture.options[key], made_with[key]):
                raise UsageError(
                    f"architecture.{key}: {entry.options[key]!r}, but the SAE in {entry.from_} was made with "
                    f"{made_with[key]!r}. Leave {key} out."
                )
        return sae

    def _built_on(self, saved: SavedSAE) -> SparseAutoencoder:
        """The run's architecture over a saved SAE of another; UsageError if it cannot be built on that."""
        entry, part, base = self.config.architecture, self.plan.architecture, saved.sae
        with blamed_on(part):
            how = part.component.load().built_on(saved.name, base, part.options, self.source)
            if how is None:
                raise UsageError(
                    f"architecture.use: {entry.use}, but the SAE in {entry.from_} is a {saved.name}. "
                    f'Write use = "{saved.name}".'
                )
            options, added = how
            checked = part.component.validate(options, "architecture")
            sae = part.component.build(checked, base.d_in, base.d_sae + added, base.d_out if base.transcoder else None)
            sae.take_over(base)
        self._is_new = True
        return sae

    def prepare_analyzers(self) -> None:
        """Let analyzers with a `prepare` look at the source and the SAE before anything is trained for them."""
        for part in self.to_do("analyzer"):
            if hasattr(part.component.load(), "prepare"):
                analyzer = self._prepared[part.key] = part.build()
                with self._at_work(part):
                    analyzer.prepare(self._context(self.directory.path, self.scale, self.target_scale))

    # --- train -------------------------------------------------------------------------------------------------

    def make_trainer(self) -> None:
        """Losses and optimiser for the SAE as it is."""
        context = self._context(self.directory.path, self.scale, self.target_scale)
        prepare: Callable[[RunContext], None] | None = getattr(self.sae, "prepare", None)
        if prepare is not None and self._is_new:
            with self._at_work(self.plan.architecture):
                prepare(context)
        for listener in self.listeners:
            if listener.vital and hasattr(listener.instance, "prepare"):
                with under_key(listener.label):
                    listener.instance.prepare(context)
        terms = []
        for part in self.plan.sections["loss"]:
            function = part.build()
            if isinstance(function, torch.nn.Module):
                function.to(self.device)
            if hasattr(function, "prepare"):
                with under_key(part.key), kept(part.component.origin, self.listeners.warn):
                    function.prepare(context)
            terms.append(Term(part.label, function, part.entry.weight, part.component))  # type: ignore[attr-defined]
        self.trainer = Trainer(
            self.sae,
            terms,
            self.config.training,
            total_steps=self.plan.total_steps,
            scale=self.scale,
            target_scale=self.target_scale,
            device=self.device,
            listeners=self.listeners,
            variant=self.variant,
        )

    def restore(self, state: RunState) -> None:
        """Go back to where the SAE was in a checkpoint."""
        state.restore(self.trainer)
        self.scale, self.target_scale = self.trainer.scale, self.trainer.target_scale

    def train_on(self, batch: Activations, sequences: SequenceBatch | None, speed: Callable[[], float]) -> None:
        """One step on a batch of activations, and on whole sequences if a loss of any SAE needs them; `speed` gives the
        tokens per second if the step is logged."""
        trainer, training = self.trainer, self.config.training
        with kept("A loss, a callback or the architecture", self.listeners.warn):  # those that can be named have been
            trainer.train_on(batch, sequences)
        if trainer.number % training.log_every == 0 or trainer.number == trainer.total_steps:
            trainer.last_logged = {**trainer.measures(), "tokens_per_second": speed()}
            self.listeners.emit("logged", trainer=trainer, number=trainer.number - 1, values=trainer.last_logged)

    def end_training(self) -> None:
        """Keep the last losses and what callbacks found, and free what only training needs."""
        last = self.trainer.last_logged
        self.losses = {k.removeprefix("loss/"): v for k, v in last.items() if k.startswith("loss/")}
        self.last_speed = last.get("tokens_per_second")
        del self.trainer
        by_key = {listener.label: listener.instance for listener in self.listeners}
        for part in self._with_results():
            with self._at_work(part), torch.random.fork_rng(devices=[]):
                result = by_key[part.key].result()
                _refuse_other_than_result(result)
                self._keep(part, result)
            self.found[part.label] = result
            self.listeners.emit("analysed", name=part.label, result=result, variant=self.variant)

    def _with_results(self) -> list[Part]:
        """The callbacks that say what they found."""
        return [part for part in self.plan.sections["callback"] if hasattr(part.component.load(), "result")]

    def settle(self) -> None:
        """After training: bring the SAE to the units of the raw activations, and let it set what training followed only on
        average; see `SparseAutoencoder.calibrate`."""
        self.sae.unscale(self.scale, self.target_scale)
        tokens = 0

        def batches() -> Iterator[torch.Tensor]:
            nonlocal tokens
            for batch in self.context.training_activations(CALIBRATION_SAMPLE):
                tokens += len(batch)
                yield batch.x

        with blamed_on(self.plan.architecture), torch.no_grad():
            found = self.sae.calibrate(batches())
        self.calibrated = {**found, "tokens": tokens} if found else {}

    def save_sae(self) -> None:
        """Write `sae/`, and go on with exactly what was written."""
        metadata = {
            "model_name": self.identity.get("model"),
            "hook_name": self.source.hook_point,
            "hook_name_out": getattr(self.source, "target_hook_point", None),
            "context_size": self.identity.get("context"),
            "prepend_bos": self.identity.get("bos"),
        }
        name = self.plan.architecture.component.qualified_name
        metadata |= {"calibrated": self.calibrated} if self.calibrated else {}
        save_sae(self.sae, self.directory.sae, name=name, metadata={k: v for k, v in metadata.items() if v is not None})
        self.sae = load_sae(self.directory.sae, device=self.device, registry=self.registry)

    # --- graph -------------------------------------------------------------------------------------------------

    def build_graph(self) -> None:
        """Build the feature graph of the SAE that is on disk, if the run file asks for one, and write it beside it."""
        part = self.plan.graph
        if part is None:
            return
        self.sae.requires_grad_(False)
        builder = part.build()
        with self._at_work(part), contextlib.closing(self._codes()) as codes:
            graph = builder(self.sae, codes)
            if not isinstance(graph, FeatureGraph):
                raise TypeError(f"it returned {type(graph).__name__}, not a saekit.FeatureGraph")
            if graph.dictionary != dictionary_digest(self.sae):
                raise ValueError("it returned a graph of another dictionary, not of the SAE it was given")
        graph.builder = part.component.qualified_name
        graph.save(self.directory.graph)
        self.graph = graph.to(self.device)

    def _codes(self) -> Generator[Code]:
        """The codes of training activations; held-out ones are left for what measures."""
        for batch in self.context.training_activations(self.plan.graph_tokens):
            with torch.no_grad():  # not around the yield: the builder decides for itself
                code = self.sae.encode(batch.x)
            yield code

    # --- evaluate, analyse -------------------------------------------------------------------------------------

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
            _refuse_other_than_result(result)
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


def _refuse_other_than_result(result: Any) -> None:
    if not isinstance(result, Result):
        raise TypeError(f"it returned {type(result).__name__}, not a saekit.Result")


def _both_return(name: str, *parts: Part) -> str:
    *first, last = (f"{part.key} ({part.component.title})" for part in parts)
    other = first[0] if first else "a metric that was measured before"
    return f"{other} and {last} both return {name!r}. Leave one out; what was saved is kept."
