"""The contract between saekit and its plugins. The shortest whole plugin, in a file `sparse.py`:

    from saekit import Component, Step, hookimpl

    def sparse(step: Step):
        return step.code.sum().mean()  # the mean over the batch of each row's activations added up

    @hookimpl
    def saekit_losses():
        yield Component("sparse", sparse)

`saekit run --plugin ./sparse.py --loss sparse:weight=0.01` trains with it. In a package, an entry point of the group `saekit`
names the module with the hooks.

A plugin implements any of the hooks below with `@saekit.hookimpl`. A hook may take fewer arguments than are listed.

*Declaring hooks* say which components a plugin offers. They are called to list, complete and validate names, so they import
nothing heavy. In a package they yield `Component`s whose targets are strings. What a target must be able to do is in
`saekit.protocols`, one class for each kind.

*Lifecycle hooks* are called during a run on its listeners: callbacks, trackers and the terminal view. A listener is an object
that the run built from a component; it implements any of these hooks as methods marked `@saekit.hookimpl`. Listeners are
called in the order of the run file. What a listener returns is ignored. The argument `number` always means the number of a step,
0 for the first: of the one that is being done or has just been done.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from saekit.errors import PluginError, near_names

if TYPE_CHECKING:
    from saekit.component import Component
    from saekit.plugin_commands import Command
    from saekit.protocols import RunInfo, Training
    from saekit.result import Result

PROJECT = "saekit"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Declaring:
    """Called whenever names are listed or looked up. Each returns or yields components of one kind."""

    @hookspec
    def saekit_architectures(self) -> Iterable[Component]:
        """Sparse autoencoders. Target: a subclass of `saekit.SparseAutoencoder`."""

    @hookspec
    def saekit_losses(self) -> Iterable[Component]:
        """Losses. Target: a function or a class whose instances take a `Step` and return an unweighted scalar."""

    @hookspec
    def saekit_graph_builders(self) -> Iterable[Component]:
        """Feature graphs. Target: called with the finished SAE and a stream of codes, returns a `FeatureGraph`."""

    @hookspec
    def saekit_metrics(self) -> Iterable[Component]:
        """Metrics on held-out data. Target: see `saekit.protocols.Metric` and `saekit.protocols.ModelMetric`."""

    @hookspec
    def saekit_analyzers(self) -> Iterable[Component]:
        """Questions asked of a finished SAE. Target: called with a `RunContext`, returns a `Result`."""

    @hookspec
    def saekit_comparisons(self) -> Iterable[Component]:
        """Questions asked of all variants of a run together. Target: called with a `ComparisonContext`, returns a `Result`."""

    @hookspec
    def saekit_callbacks(self) -> Iterable[Component]:
        """Listeners that may change the run. One that raises stops the run with exit code 3."""

    @hookspec
    def saekit_sources(self) -> Iterable[Component]:
        """Sources of activations. Target: see `saekit.protocols.Source`."""

    @hookspec
    def saekit_trackers(self) -> Iterable[Component]:
        """Listeners that only record. One that raises is dropped with a warning; the run goes on."""

    @hookspec
    def saekit_recipes(self) -> Iterable[Component]:
        """Ready-made run files. Target: the path of a TOML file inside a package, as `"package:file.toml"`."""

    @hookspec
    def saekit_commands(self) -> Iterable[Command]:
        """Commands of `saekit`. Target: a click command, imported when the user calls it."""


class Lifecycle:
    """Called on the listeners of a run, and only there.

    A callback may also have `measures(trainer)`, scalars by name that are logged as `LABEL/NAME`, like that of a loss
    (`saekit.protocols.Loss`); it is called after each step that is logged."""

    @hookspec
    def run_started(self, run: RunInfo) -> None:
        """The plan is made and the directory exists; nothing heavy is loaded yet."""

    @hookspec
    def phase_started(self, phase: str, total: int | None) -> None:
        """A phase begins: `prepare`, `train`, `graph` (with `[graph]`), `evaluate`, `analyse` or `report`. `total` counts its
        units if their number is known: activations in train and evaluate, analyzers and comparisons in analyse. Activations are
        harvested within the other phases; only the time that training waits for them is counted, as `harvest`."""

    @hookspec
    def phase_advanced(self, phase: str, done: int) -> None:
        """The phase goes on: `done` of its units are done so far."""

    @hookspec
    def harvest_advanced(self, done: int, total: int) -> None:
        """Within a phase, activations are being harvested: `done` of the block's `total` are there. Or a source prepares itself
        (`saekit.prepared`): `done` of `total` steps. Called about once a second while the run waits."""

    @hookspec
    def phase_ended(self, phase: str, seconds: float) -> None:
        """The phase is over."""

    @hookspec
    def training_started(self, trainer: Training) -> None:
        """Weights, optimiser and losses exist, and are restored if the run was resumed; the first step is next."""

    @hookspec
    def step_started(self, trainer: Training, number: int) -> None:
        """Step `number` is about to encode its batch."""

    @hookspec
    def gradients_ready(self, trainer: Training, number: int) -> None:
        """Backward is done and gradients are clipped; the optimiser has not moved yet."""

    @hookspec
    def step_ended(self, trainer: Training, number: int) -> None:
        """The optimiser has moved. `trainer.step` and `trainer.losses` hold this step's tensors. Copying one to the host
        waits for the device, so a listener should do that only when it must."""

    @hookspec
    def logged(self, trainer: Training, number: int, values: dict[str, float]) -> None:
        """Every `training.log_every` steps: the losses and running measures of step `number` as plain numbers, with what `measures`
        of losses and callbacks return."""

    @hookspec
    def checkpoint_saved(self, trainer: Training, number: int, path: Path) -> None:
        """A whole checkpoint is at `path`; step `number` is the last one in it."""

    @hookspec
    def evaluated(self, metrics: dict[str, float | None], variant: str) -> None:
        """Metrics on held-out data. `variant` is empty if the run has none."""

    @hookspec
    def analysed(self, name: str, result: Result, variant: str) -> None:
        """The analyzer `name`, or at the end of training the callback, has returned its `Result`. `variant` is empty if the run has
        none. The view, and the listeners of a run without variants, hear of a comparison in the same way, without a variant."""

    @hookspec
    def warned(self, message: str) -> None:
        """Something that the user should know and that does not stop the run."""

    @hookspec
    def run_finished(self, run: RunInfo | None, summary: dict[str, Any]) -> None:
        """Everything is on disk; `summary` is the content of `summary.json`. `run` is None when a finished run is only shown
        again."""

    @hookspec
    def run_failed(self, run: RunInfo, error: BaseException) -> None:
        """The run stops with `error`, which may be an interruption. Called once."""


def check_arguments(hook: str, implementation: Callable[..., Any], family: type) -> None:
    """PluginError if an implementation asks for an argument that its hook does not have. It may take fewer."""
    known = list(inspect.signature(getattr(family, hook)).parameters)[1:]
    for name, parameter in inspect.signature(implementation).parameters.items():
        if name not in known and parameter.default is inspect.Parameter.empty:
            raise PluginError(
                f"{hook!r} asks for an argument {name!r}, which the hook does not have.{near_names(name, known)} It has: "
                f"{', '.join(known) or 'none'}."
            )
