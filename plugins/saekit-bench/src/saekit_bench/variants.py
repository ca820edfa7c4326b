"""Several SAEs in one pass against the same SAEs one by one: the sum of their separate steps, and one harvest."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from saekit.activations.batch import Activations
from saekit.activations.shuffle import ShuffledBatches
from saekit.config import RunConfig, Variant
from saekit.errors import UsageError
from saekit.plugins import Registry
from saekit.run_directory import RunDirectory
from saekit.runner.plan import plan_run
from saekit.runner.run import Run
from saekit.runner.sae_run import SAERun
from saekit_bench.timing import alternate

SEEDS = 4
"""A run file without variants is timed with this many seeds."""


def time_variants(config: RunConfig, registry: Registry, *, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of `steps` batches harvested once for all variants, of the harvest, and of each variant's steps alone.

    All in one Python thread, so that no harvest runs in parallel with a step. Trackers are left out."""
    if not config.training.tokens:
        raise UsageError("training.tokens: is 0, so there is no step to time. Give a run file that trains.")
    variants = config.variant or [Variant(name=f"seed{n}", training={"seed": n}) for n in range(SEEDS)]
    variants = [variant.model_copy(update={"tracker": None}) for variant in variants]
    config = config.model_copy(update={"variant": variants, "tracker": [], "defaults": False})
    training = config.training
    plan = plan_run(config, registry)
    with tempfile.TemporaryDirectory() as place, RunDirectory.create(plan.config, str(Path(place) / "run")) as directory:
        run = Run(plan, directory, registry)
        for one in run.sae_runs:
            one.directory.begin(one.config)
        run.prepare()
        run.begin_training()

    def batches() -> Iterator[Activations]:
        # One block, slightly larger than needed, since a source gives roughly the number asked for.
        block = (steps + 1) * training.batch_size
        shuffled = ShuffledBatches(
            run.source, batch_size=training.batch_size, block_size=block, seed=training.order_seed
        )
        return (batch.to(run.device) for batch in itertools.islice(shuffled, steps))

    def harvest() -> None:
        for _ in batches():
            pass

    def together() -> None:
        for batch in batches():
            for one in run.sae_runs:
                _step(one, batch)

    ready = list(batches())

    def alone(one: SAERun) -> None:
        for batch in ready:
            _step(one, batch)

    for one in run.sae_runs:
        one.trainer.total_steps = 10**9  # so that no schedule ends
        for batch in itertools.islice(itertools.cycle(ready), 3):
            _step(one, batch)
        one.trainer.guard = None  # it has seen every loss before timing
    each = {f"{one.variant} alone": (lambda one=one: alone(one)) for one in run.sae_runs}
    timings = alternate({"together": together, "harvest": harvest, **each}, rounds, run.device)
    apart = sum(timing.median for name, timing in timings.items() if name != "together")
    return {
        "variants": len(run.sae_runs),
        "steps": steps,
        "batch": training.batch_size,
        "seconds": {name: timing.median for name, timing in timings.items()},
        "ratio": {name: getattr(timings["together"], name) / apart for name in ("median", "low", "high")},
        "threads": torch.get_num_threads(),
    }


def _step(one: SAERun, batch: Activations) -> None:
    with one.turn():
        one.trainer.train_on(batch)
