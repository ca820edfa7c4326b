"""What a `RunContext` gives: the activations that training saw, the held-out ones, as many as were asked for."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import pytest
import torch

from saekit.activations.shuffle import ShuffledBatches
from saekit.errors import RunError
from saekit.testing import tiny_run
from saekit.testing.tiny import tiny_table

SEEDS = {"seed": 5, "data_seed": 7}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory):
    training = {**tiny_table()["training"], **SEEDS}
    return tiny_run(tmp_path_factory.mktemp("run") / "run", training=training).context


def rows(x: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.tolist()}


def test_training_activations_are_those_that_training_saw(context) -> None:
    training = context.config.training
    assert (training.order_seed, context.seed) == (7, 5)
    batches = ShuffledBatches(
        context.source, batch_size=training.batch_size, block_size=training.buffer, seed=training.order_seed
    )
    seen = torch.cat([next(batches).x for _ in range(96)])  # three blocks
    given = torch.cat([batch.x for batch in context.training_activations(2000)])  # the first of them, and most of the second
    assert len(rows(given)) == 2000 and rows(given) < rows(seen)


@pytest.mark.parametrize("tokens", [1, 32, 50, 128, 300])
def test_as_many_are_given_as_were_asked_for(context, tokens: int) -> None:
    training, evaluation = context.config.training, context.config.evaluation
    for given, size in ((context.training_activations, training.batch_size), (context.held_out_activations, evaluation.batch_size)):
        if given == context.held_out_activations and tokens > 256:  # all there are
            continue
        sizes = [len(batch) for batch in given(tokens)]
        assert sum(sizes) == tokens and max(sizes) <= size


@pytest.mark.parametrize("given", ["held_out_activations", "training_activations"])
def test_activations_that_are_not_finite_are_left_out_and_told(context, given: str) -> None:
    told: list[str] = []
    whole = torch.cat([batch.x for batch in getattr(context, given)(100)])
    bad = torch.tensor([0, 40, 41])

    class Damaged:
        hook_point = "here"

        def blocks(self, split: str, **options):
            for block in context.source.blocks(split, **options):
                x = block.x.clone()
                x[bad, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf])
                yield dataclasses.replace(block, x=x)

    damaged = dataclasses.replace(context, source=Damaged(), warn=told.append)
    found = torch.cat([batch.x for batch in getattr(damaged, given)(100)])
    assert torch.equal(found, whole[[row not in bad for row in range(100)]])
    (message,) = told
    assert message.startswith("3 of 100 ") and "here are not finite, the first in batch 1;" in message


def test_without_a_finite_activation_the_run_stops(context) -> None:
    nothing = types.SimpleNamespace(
        hook_point="here",
        blocks=lambda split, **options: (
            dataclasses.replace(block, x=block.x * torch.nan) for block in context.source.blocks(split, **options)
        ),
    )
    with pytest.raises(RunError, match="none of the held-out activations of here is finite"):
        list(dataclasses.replace(context, source=nothing).held_out(100))


def test_another_order_of_the_data_gives_other_activations(context, tmp_path: Path) -> None:
    config = context.config
    other = config.model_copy(update={"training": config.training.model_copy(update={"data_seed": 8})})
    first, second = (next(c.training_activations(32)).x for c in (context, dataclasses.replace(context, config=other)))
    assert not rows(first) & rows(second)
