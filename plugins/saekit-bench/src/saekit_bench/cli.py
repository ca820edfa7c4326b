"""`saekit bench`: each benchmark measures something against a floor, or against other libraries, in the same run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


@click.group("bench")
def command() -> None:
    """Time a training step, the harvest or a whole training against its floor and its peers, or the start of a command.

    Candidates take turns; results are medians with quartiles.
    """


def _common(function: Callable[..., None]) -> Callable[..., None]:
    """The parameters of every benchmark: a run file, overrides, and the output format."""
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
        click.option(
            "-o", "--override", "overrides", multiple=True, metavar="key=value", help="Set a key of the run file."
        ),
        click.argument("recipe", required=False, metavar="[RECIPE|FILE.toml]"),
    ):
        function = decorate(function)
    return function


def _rounds(function: Callable[..., None]) -> Callable[..., None]:
    return click.option("--rounds", default=9, show_default=True, help="How often each candidate is measured.")(
        function
    )


@command.command("step")
@_common
@_rounds
@click.option("--d-in", default=512, show_default=True, help="Width of the activations.")
@click.option("--batch", default=2048, show_default=True, help="Activations a step.")
@click.option("--l0", type=float, help="Lower the encoder's biases until a row has this many active latents.")
@click.option("--peers", is_flag=True, help="Time sae_lens, sparsify and dictionary_learning too, if installed.")
def step(recipe: str | None, overrides: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """A training step in units of one encoder product, and its peak memory in units of the pre-activations.

    The run file sets architecture, width and losses.
    """
    from saekit_bench.step import time_step

    plan, device = _planned(recipe, overrides)
    _show(time_step(plan, device, **settings), as_json)


@command.command("harvest")
@_common
@_rounds
@click.option("--tokens", default=16_384, show_default=True, help="Activations a block.")
def harvest(recipe: str | None, overrides: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """The harvest in units of a bare forward through the same truncated model. The run file sets model and text."""
    from saekit_bench.harvest import time_harvest

    plan, device = _planned(recipe, overrides)
    _show(time_harvest(plan, device, **settings), as_json)


@command.command("variants")
@_common
@_rounds
@click.option("--steps", default=8, show_default=True, help="Batches a round.")
def variants(recipe: str | None, overrides: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """A pass of several variants in units of their separate steps and one harvest. Without variants: four seeds."""
    from saekit.runner.compose import Request, compose
    from saekit_bench.variants import time_variants

    config, registry = compose(Request(recipe, overrides=overrides))
    _show(time_variants(config, registry, **settings), as_json)


@command.command("training")
@_common
@click.option("--peers", is_flag=True, help="Train with sae_lens's runner too.")
def training(recipe: str | None, overrides: tuple[str, ...], as_json: bool, peers: bool) -> None:
    """A whole training, harvest included: activations per second, and the explained variance that it reaches."""
    from saekit.runner.compose import Request, compose
    from saekit.runner.plan import plan_run
    from saekit_bench.end_to_end import time_training

    config, registry = compose(Request(recipe, overrides=overrides))
    _set_threads(config.training.threads)
    _show(time_training(plan_run(config, registry), registry, peers=peers), as_json)


@command.command("parity")
@_common
@click.option(
    "--architecture", "architectures", multiple=True, help="An architecture to compare; by default all."
)
@click.option("--seeds", default=3, show_default=True, help="Trainings of each setting.")
@click.option("--tokens", default=409_600, show_default=True, help="Activations each SAE is trained on.")
@click.option("--held-out", default=40_000, show_default=True, help="Activations each SAE is measured on.")
@click.option("--batch", default=512, show_default=True, help="Activations a step.")
@click.option(
    "--rows",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("parity.jsonl"),
    show_default=True,
    help="A file of results; what is in it already is not trained again.",
)
def parity(
    recipe: str | None, overrides: tuple[str, ...], as_json: bool, architectures: tuple[str, ...], **settings: Any
) -> None:
    """Explained variance at equal L0 beside sae_lens's trainer, on the same activations. Takes an hour."""
    from saekit.errors import UsageError, near_names
    from saekit.runner.compose import Request, compose
    from saekit.runner.plan import make_plan
    from saekit_bench.parity import CASES, compare, summarise

    for name in architectures:
        if name not in CASES:
            raise UsageError(f"--architecture: there is no comparison for {name!r}.{near_names(name, CASES)}")
    config, registry = compose(Request(recipe, overrides=overrides))
    _set_threads(config.training.threads)
    chosen = architectures or tuple(CASES)
    report = functools.partial(click.echo, err=True)
    rows = compare(make_plan(config, registry), registry, architectures=chosen, report=report, **settings)
    table = [line for name in chosen for line in summarise(rows, name)]
    if as_json:
        click.echo(json.dumps(table, indent=2))
        return
    for line in table:
        click.echo(
            f"{line['architecture']:<11} L0 {line['l0']:6.1f}  saekit {line['saekit']:.4f}  sae_lens {line['sae_lens']:.4f}  "
            f"difference {line['difference']:+.4f} ({line['lowest']:+.4f} to {line['highest']:+.4f})  {line['seeds']} seeds"
        )


@command.command("startup")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@_rounds
@click.option("--plugins", default=50, show_default=True, help="How many plugins to install while it is measured.")
def startup(as_json: bool, **settings: Any) -> None:
    """Seconds of `saekit --help` and `saekit plugins` with many plugins installed beside the real ones."""
    from saekit_bench.startup import time_startup

    _show(time_startup(**settings), as_json)


def _planned(recipe: str | None, overrides: tuple[str, ...]) -> tuple[Any, Any]:
    from saekit.runner.compose import Request, compose
    from saekit.runner.hardware import choose_device
    from saekit.runner.plan import make_plan

    plan = make_plan(*compose(Request(recipe, overrides=overrides)))
    settings = plan.config.training
    _set_threads(settings.threads)
    return plan, choose_device(settings.device, settings.precision)


def _set_threads(threads: int | None) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        click.echo(f"{key:<20} {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key} ({_shown(v)})" if isinstance(v, dict) else f"{key} {_shown(v)}" for key, v in value.items()
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)
