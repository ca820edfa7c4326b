"""`saekit.Online`: an SAE that is trained beside a model while a program trains or runs that model."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saekit.api import FinishedRun, composed
from saekit.errors import OptionError, UsageError
from saekit.plugins import Registry
from saekit.run_directory import RunDirectory
from saekit.runner.fed import FedRun
from saekit.runner.plan import RunPlan, plan_run

if TYPE_CHECKING:
    from saekit.activations.pooling import Pool
    from saekit.sae.base import SparseAutoencoder


class Online:
    """A run that the program feeds: it pushes activations, and says when a step of its own is done.

        with saekit.Online({...}, directory="runs/online") as online:
            for batch in batches:
                hidden = train_my_model_on(batch)  # [n, d]
                online.push(hidden)
                online.step()

    The run file's source must be one that can be pushed to, such as `pushed`. Everything else is as in `saekit.run`: the same
    losses, callbacks, metrics, trackers, schedules, variants and run directory. When the block ends, the SAE is saved and
    measured on what was held out, and `finished` has the result. If an error leaves the block, a checkpoint is saved and the error
    goes on; `Online.resume(directory)` continues. The program's random numbers, modes and threads are not touched.

    what: a run file's path, or its content as a dictionary. overrides, plugins, directory, view: as in `saekit.run`.
    finished: the finished run; None before.
    """

    def __init__(
        self,
        what: str | Path | Mapping[str, Any],
        *,
        overrides: Mapping[str, Any] | None = None,
        plugins: Iterable[str | Path] = (),
        directory: str | Path | None = None,
        view: Any = None,
    ) -> None:
        """Plan the run. Raises the errors of `saekit.errors`; nothing is written before the `with` block."""
        config, registry = composed(what, overrides, plugins)
        plan = _checked(plan_run(config, registry))
        place = None if directory is None else str(directory)
        self._open(plan, registry, lambda: RunDirectory.create(plan.config, place), view)

    @classmethod
    def resume(cls, where: str | Path, *, no_plugins: Iterable[str] = (), view: Any = None) -> Online:
        """Continue the run in the directory `where` from its newest whole checkpoint, if it has one: weights, optimiser, step,
        schedules and what losses and callbacks keep are bit for bit as they were. The buffer begins anew unless its source keeps
        it (`keep` of `pushed`), so then other activations come from here on. UsageError if the run has finished."""
        with RunDirectory.resume(str(where)) as (place, config):
            _refuse_finished(place)
            registry = Registry(files=config.plugins, disabled=no_plugins)
            registry.refuse_broken_files()
            plan = _checked(plan_run(config, registry))
        online = cls.__new__(cls)
        online._open(plan, registry, lambda: _resumed(str(where)), view)
        return online

    def _open(
        self, plan: RunPlan, registry: Registry, place: Callable[[], contextlib.AbstractContextManager[RunDirectory]], view: Any
    ) -> None:
        self._plan, self._registry, self._place, self._view = plan, registry, place, view
        self._run: FedRun | None = None
        self._inside = contextlib.ExitStack()  # the directory, and the hooks of `watch`
        self._left_out = 0
        self._ended = False
        self.finished: FinishedRun | None = None

    def __enter__(self) -> Online:
        if self._run is not None:
            raise UsageError("this online run has begun already. Make a new Online, or Online.resume(directory).")
        with contextlib.ExitStack() as begun, _beside(draws=True):
            directory = begun.enter_context(self._place())
            self._run = FedRun(self._plan, directory, self._registry, view=self._view)
            self._run.begin()
            self._inside = begun.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        run = self._begun
        with self._inside, _beside(draws=True):
            if error is not None:
                run.leave(error)
            elif not self._ended:
                self.finish()
            self._ended = True

    @property
    def directory(self) -> Path:
        """Where the run's files are."""
        return self._begun.directory.path

    @property
    def steps(self) -> int:
        """How many steps of the SAE are done."""
        return self._begun.number

    @property
    def done(self) -> bool:
        """Whether it has had all of its steps; later ones of the program are without effect."""
        return self._begun.is_over

    @property
    def losses(self) -> dict[str, Tensor]:
        """The losses of the last step by name, unweighted, where they were computed; empty before the first. With variants, of the
        first one."""
        trainer = getattr(self._begun.sae_runs[0], "trainer", None)
        return dict(trainer.losses) if trainer is not None else {}

    def sae(self, variant: str = "") -> SparseAutoencoder:
        """A copy of the SAE as it is now, in evaluation mode and for activations as they are pushed. variant: which one of several.
        UsageError before the first step."""
        run = self._begun
        one = next((one for one in run.sae_runs if one.variant == variant), None)
        if one is None:
            known = ", ".join(repr(one.variant) for one in run.sae_runs)
            raise UsageError(f"sae: there is no variant {variant!r}. The run trains {known}.")
        trainer = getattr(one, "trainer", None)
        if trainer is None and not self._ended:
            raise UsageError("sae: there is none before the first step. Push until the buffer is filled, and call step.")
        with _beside(draws=True):
            sae = copy.deepcopy(one.sae if trainer is None else trainer.sae)
            if trainer is not None:
                sae.unscale(trainer.scale, trainer.target_scale)
        return sae.requires_grad_(False).eval()

    def push(self, x: Tensor, *, held_out: bool | None = None) -> None:
        """Copy activations into the buffer, detached from their graph.

        x: [n, d] with the width that the run file says, of any float type, on any device; it is converted to float32 and moved to
        where the buffer is. Rows that are not finite are left out, with a warning. held_out: True for rows that no step may use, on
        which the SAE is measured; None lets the source decide. UsageError for anything else, and after the end.
        """
        run = self._running("push")
        if not isinstance(x, Tensor):
            raise UsageError(f"push: takes a tensor [n, {run.source.d_in}], and was given {type(x).__name__}.")
        if not x.is_floating_point():
            raise UsageError(f"push: takes floating-point numbers, and was given {x.dtype}. Convert it with .float().")
        if x.ndim != 2 or x.shape[1] != run.source.d_in:
            raise UsageError(
                f"push: takes a tensor [n, {run.source.d_in}], and was given {list(x.shape)}. Give the rows that are not padding, "
                "x[mask], or set source.d_in to the width of what is pushed."
            )
        with _beside():
            x = x.detach().float()
            finite = x.isfinite().all(1)  # [n]
            if not bool(finite.all()):
                x = x[finite]
                self._left_out += int((~finite).sum())
                run.warn("Some of the activations that were pushed are not finite; such rows are left out.")
            run.source.push(x, held_out)

    def step(self) -> bool:
        """The program has done a step: the SAE has one too, if it is its turn and the buffer holds enough. Returns whether it had.

        Nothing happens before the buffer is filled, and when all steps are done. UsageError after the end."""
        run = self._running("step")
        if run.is_over or not run.source.due() or run.source.held < run.config.training.batch_size:
            return False
        with _beside(draws=run.number == 0):
            run.step()
        return True

    def save(self) -> None:
        """Write a checkpoint now, for example when the program writes one of its model. Nothing happens before the first step."""
        run = self._running("save")
        with _beside():
            run.save()

    def finish(self) -> FinishedRun:
        """End training: save the SAE, measure it on what is held out, write summary and report. Leaving the block does it."""
        run = self._running("finish")
        self._ended = True
        with _beside(draws=True):
            if self._left_out:
                run.warn(f"{self._left_out:,} of the activations that were pushed were not finite; they are left out.")
            summary = run.finish()
        self.finished = FinishedRun(run.directory.path, summary)
        return self.finished

    @contextlib.contextmanager
    def watch(
        self,
        model: nn.Module,
        hook_point: str | None = None,
        *,
        pool: Pool = "none",
        mask: str | Callable[[], Tensor] | None = None,
        only_in_training: bool = False,
    ) -> Iterator[None]:
        """Push what every forward of `model` inside has at a hook point; `step` is still for the program to call.

        hook_point: its name, as in a source; that of the run file's source by default.
        pool: what becomes of activations [n, T, d]: every position ("none"), or the masked mean, max, first or last of each row.
        mask: zero at padding, which is left out: the name of an argument of the model's forward, or a function that gives it.
        only_in_training: leave out forwards in which the model is in evaluation mode.
        """
        from saekit.activations.pooling import pooled
        from saekit.activations.sites import resolve

        run = self._running("watch")
        name = hook_point or run.source.hook_point
        if name is None:
            raise UsageError("watch: needs a hook point. Give it, or set source.hook_point.")
        site, arguments = resolve(model, name), _Arguments(model, mask)

        def take(activation: Tensor) -> None:
            if model.training or not only_in_training:
                try:
                    rows = pooled(activation.detach(), arguments.mask(), pool)
                except OptionError as error:
                    raise UsageError(f"watch: hook point {name!r}: {error}") from None
                self.push(rows)

        with arguments.seen(), site.heard_by(take):
            yield

    @property
    def _begun(self) -> FedRun:
        if self._run is None:
            raise UsageError("this online run has not begun. Use it in a with block: with saekit.Online(...) as online.")
        return self._run

    def _running(self, what: str) -> FedRun:
        run = self._begun
        if self._ended:
            raise UsageError(f"{what}: the run in {run.directory.path} has ended. Begin another one in a new directory.")
        return run


class _Arguments:
    """The mask that a model's forward is given, or that a function gives."""

    def __init__(self, model: nn.Module, mask: str | Callable[[], Tensor] | None) -> None:
        self._model, self._mask = model, mask
        self._value: Tensor | None = None
        if isinstance(mask, str):
            signature = inspect.signature(model.forward)
            if mask not in signature.parameters:
                known = ", ".join(signature.parameters)
                raise UsageError(f"watch: mask: {type(model).__name__}'s forward takes no {mask!r}, but {known}. Name one of them.")

    def mask(self) -> Tensor | None:
        """The mask of the forward that is under way; None if it has none."""
        return self._mask() if callable(self._mask) else self._value

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """Look at the arguments of every forward in the block."""

        name = self._mask
        if not isinstance(name, str):
            yield
            return
        signature = inspect.signature(self._model.forward)

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._value = signature.bind_partial(*args, **kwargs).arguments.get(name)

        handle = self._model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _checked(plan: RunPlan) -> RunPlan:
    """The plan; UsageError if it is of a run that cannot be fed."""
    training, source = plan.config.training, plan.members[0].build_source()
    if not hasattr(source, "push"):
        raise UsageError(
            f"source.use: {plan.config.source.use!r} reads its activations itself, so nothing can be pushed to it. Choose a source "
            "that is fed, or use saekit.run."
        )
    if not plan.total_steps:
        raise UsageError("training.tokens: 0 trains nothing, and an online run is there to train. Give at least one batch.")
    if training.threads:
        raise UsageError("training.threads: the threads of an online run are the program's. Leave it out.")
    if source.rows < training.batch_size:
        raise UsageError(
            f"source.rows: a buffer of {source.rows} rows cannot hold a batch of {training.batch_size}. Raise it, or lower "
            "training.batch_size."
        )
    return plan


def _refuse_finished(place: RunDirectory) -> None:
    if place.finished_summary() is not None:
        raise UsageError(f"{place.path}: this run has finished. Begin another one in a new directory.")


@contextlib.contextmanager
def _resumed(where: str) -> Iterator[RunDirectory]:
    with RunDirectory.resume(where) as (place, _):
        _refuse_finished(place)
        yield place


@contextlib.contextmanager
def _beside(*, draws: bool = False) -> Iterator[None]:
    """saekit is at work in the block, whatever mode the program is in. draws: it may use torch's own generators, which are then
    put back as the program had them."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kinds = {"cpu", accelerator.type if accelerator else "cpu"}
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        for kind in kinds:
            modes.enter_context(torch.autocast(kind, enabled=False))
        if draws:
            devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
            modes.enter_context(torch.random.fork_rng(devices=devices))
        yield
