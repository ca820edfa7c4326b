"""`SAERun`: one SAE's part of a run, from its first weights to its graph. A run has one, or one for each variant.

What is measured of the finished SAE is in its base, `measuring.MeasuredSAE`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from saekit.activations.batch import Activations, SequenceBatch
from saekit.activations.trained_positions import TrainedPositions
from saekit.component_option import fits
from saekit.errors import UsageError, under_key
from saekit.graph import FeatureGraph, dictionary_digest
from saekit.listeners import Listener, Listeners
from saekit.plugins import Registry
from saekit.process_state import kept
from saekit.protocols import RunInfo, Source
from saekit.runner.blame import blamed_on, explained, of_variant
from saekit.runner.context import RunContext
from saekit.runner.measuring import MeasuredSAE, refuse_other_than_result
from saekit.runner.plan import SAEPlan
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


class SAERun(MeasuredSAE):
    """One SAE's part of a run: its plan, directory, listeners, losses, optimiser and random numbers.

    The run owns the data and hands it over. Whatever an SAE does is done in its `turn`.

    identity: of the source.
    scale, target_scale: what activations are multiplied by in training.
    """

    identity: dict[str, Any]
    trainer: Trainer

    def __init__(self, plan: SAEPlan, info: RunInfo, registry: Registry, above: Listeners) -> None:
        super().__init__(plan, info, registry, above)
        self.last_speed: float | None = None  # as last logged, which may have been before the run was resumed
        self.scale = self.target_scale = 1.0
        self._draws: OwnRandomness | None = None
        self._is_new = plan.config.architecture.from_ is None  # whether its `prepare` is still to come
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
                refuse_other_than_result(result)
                self._keep(part, result)
            self.found[part.label] = result
            self.listeners.emit("analysed", name=part.label, result=result, variant=self.variant)

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
