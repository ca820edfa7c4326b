"""`saekit bench`."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("bench")
@click.argument("what", type=click.Choice(["step", "harvest"]))
@click.argument("recipe", required=False, metavar="[RECIPE|FILE.toml]")
@click.option("-o", "--override", "overrides", multiple=True, metavar="key=value", help="Set any key of the run file.")
@click.option("--d-in", default=512, show_default=True, help="step: width of the activations.")
@click.option("--batch", default=2048, show_default=True, help="step: activations a step.")
@click.option("--tokens", default=16_384, show_default=True, help="harvest: activations a block.")
@click.option("--rounds", default=9, show_default=True, help="Times that each candidate is measured, in turns.")
@click.option("--peers", is_flag=True, help="step: time sae_lens, sparsify and dictionary_learning too, if installed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    what: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    d_in: int,
    batch: int,
    tokens: int,
    rounds: int,
    peers: bool,
    as_json: bool,
) -> None:
    """Time a training step in units of one encoder product, or the harvest in units of a bare forward.

    The run file says which architecture and losses, or which model and text; both candidates are timed in turns.
    """
    from saekit.runner.compose import Request, compose
    from saekit.runner.hardware import choose_device
    from saekit.runner.plan import make_plan

    plan = make_plan(*compose(Request(recipe, overrides=overrides)))
    training = plan.config.training
    device = choose_device(training.device, training.precision)
    if training.threads:
        import torch

        torch.set_num_threads(training.threads)
    result = _step(plan, device, d_in, batch, rounds, peers) if what == "step" else _harvest(plan, device, tokens, rounds)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        click.echo(f"{key:<20} {_shown(value)}")


def _step(plan: Any, device: Any, d_in: int, batch: int, rounds: int, peers: bool) -> dict[str, Any]:
    from saekit.bench.step import time_step

    return time_step(plan, device, d_in=d_in, batch=batch, rounds=rounds, peers=peers)


def _harvest(plan: Any, device: Any, tokens: int, rounds: int) -> dict[str, Any]:
    from saekit.bench.harvest import time_harvest

    return time_harvest(plan, device, tokens=tokens, rounds=rounds)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({_shown(v)})" if isinstance(v, dict) else f"{key} {_shown(v)}" for key, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
