"""What a `RunContext` gives: the activations that training saw, the held-out ones, as many as were asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from saekit.activations.shuffle import ShuffledBatches
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


def test_another_order_of_the_data_gives_other_activations(context, tmp_path: Path) -> None:
    config = context.config
    other = config.model_copy(update={"training": config.training.model_copy(update={"data_seed": 8})})
    first, second = (next(c.training_activations(32)).x for c in (context, dataclasses.replace(context, config=other)))
    assert not rows(first) & rows(second)
