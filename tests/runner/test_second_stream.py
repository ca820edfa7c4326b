"""What training is given besides shuffled activations: whole labelled sequences, and a graph that a callback keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Outcome

import saekit

PLUGIN = """
import torch
from saekit import Component, FeatureGraph, hookimpl

SEEN = []

def pooled(step):
    '''The mean activation of labelled sequences.'''
    sequences = step.sequences
    assert sequences.x.shape[0] == len(sequences.labels) and len(sequences.code) == int(sequences.mask.sum())
    again = step.sae.pre_activations(sequences.x[sequences.mask]).topk(4).values.relu().sum(1)
    torch.testing.assert_close(sequences.code.sum(), again)
    SEEN.append((step.number, float(sequences.x.double().sum())))
    return sequences.code.sum().mean()

def pull(step):
    return step.graph.weight.sum() * step.code.sum().mean()

class Ring:
    '''A graph from the third step on.'''
    @hookimpl
    def step_started(self, trainer, number):
        if number == 3:
            edges = torch.tensor([[1, 2], [0, 1]])
            trainer.graph = FeatureGraph.of(trainer.sae, edges, torch.ones(2))

class Late:
    def __call__(self, step):
        return pull(step)
    def active(self, step):
        return step.graph is not None

@hookimpl
def saekit_losses():
    yield Component("pooled", pooled, needs=("sequences",))
    yield Component("late", Late, needs=("graph",))

@hookimpl
def saekit_callbacks():
    yield Component("ring", Ring, provides=("graph",))

@hookimpl
def saekit_analyzers():
    yield Component("seen", lambda context: __import__("saekit").Result(tables={"seen": [{"n": n, "x": x} for n, x in SEEN]}))
"""
SOURCE = {"use": "synthetic", "d_in": 16, "n_features": 32, "probability": 0.1, "held_out": 500, "concepts": [0, 1]}
MSE = {"use": "mse"}


@pytest.fixture
def runs(
    command: Callable[..., Outcome],
    run_file: Callable[..., Path],
    plugin_file: Callable[[str, str], Path],
    tmp_path: Path,
) -> Callable[..., Outcome]:
    def run(name: str = "run", *arguments: str, **changes: Any) -> Outcome:
        file = run_file(**{"source": SOURCE, **changes})
        place = tmp_path / name
        return command("run", file, "--plugin", plugin_file("second", PLUGIN), "--directory", place, "--json", *arguments)

    return run


def weights(place: Path) -> torch.Tensor:
    return saekit.load_sae(place / "sae").W_enc.detach()


def test_losses_that_pool_get_whole_sequences_of_the_scale_of_x_anew_each_step(
    runs: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = runs(loss=[MSE, {"use": "pooled", "weight": 0.01}], analyzer=[{"use": "seen"}], training__sequences=6)
    assert done.code == 0, done.err
    table = json.loads((tmp_path / "run" / "analysis" / "seen" / "result.json").read_text())["tables"]["seen"]
    sums = [row["x"] for row in table]
    assert len(set(sums)) == len(sums), "every step has sequences of its own"
    assert runs("other", loss=[MSE]).code == 0
    assert not torch.equal(weights(tmp_path / "run"), weights(tmp_path / "other"))


def test_a_member_without_such_a_loss_trains_as_if_there_were_no_second_stream(
    runs: Callable[..., Outcome], tmp_path: Path
) -> None:
    variants = [{"name": "plain"}, {"name": "pooling", "loss": [MSE, {"use": "pooled", "weight": 0.01}]}]
    assert runs("both", loss=[MSE], variant=variants).code == 0
    assert runs("alone", loss=[MSE]).code == 0
    assert torch.equal(weights(tmp_path / "both" / "variants" / "plain"), weights(tmp_path / "alone"))
    assert not torch.equal(weights(tmp_path / "both" / "variants" / "pooling"), weights(tmp_path / "alone"))


def test_how_many_sequences_is_the_same_for_all_variants(runs: Callable[..., Outcome]) -> None:
    done = runs(variant=[{"name": "a", "training": {"sequences": 3}}])
    assert done.code == 2
    done.says("variant.a.training.sequences", "the same for all variants")


def test_a_source_without_labels_cannot_give_sequences(runs: Callable[..., Outcome]) -> None:
    done = runs(source={**SOURCE, "concepts": []}, loss=[MSE, {"use": "pooled"}])
    assert done.code == 2
    done.says("loss.pooled", "needs 'sequences'", "List features in source.concepts.")


def test_a_graph_of_a_callback_reaches_losses_once_it_is_there(runs: Callable[..., Outcome], tmp_path: Path) -> None:
    done = runs(loss=[MSE, {"use": "late", "weight": 0.01}], callback=[{"use": "ring"}], training__log_every=1)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    spoke = [line["step"] for line in lines if "loss/late" in line]
    assert spoke and min(spoke) == 3


def test_without_such_a_callback_the_loss_is_refused(runs: Callable[..., Outcome]) -> None:
    done = runs(loss=[MSE, {"use": "late"}])
    assert done.code == 2
    done.says("loss.late", "needs 'graph'", "callback 'ring'")


def test_a_callback_gives_no_graph_to_what_comes_after_training(runs: Callable[..., Outcome], plugin_file: Any) -> None:
    other = plugin_file(
        "after",
        "from saekit import Component, Result, hookimpl\n"
        "@hookimpl\ndef saekit_analyzers():\n    yield Component('after', lambda c: Result(), needs=('graph',))\n",
    )
    done = runs("run", "--plugin", str(other), callback=[{"use": "ring"}], analyzer=[{"use": "after"}])
    assert done.code == 2
    done.says("analyzer.after", "needs 'graph'", "Add a table [graph]")


def test_an_analyzer_that_prepares_stops_a_run_before_it_trains(
    runs: Callable[..., Outcome], plugin_file: Any, tmp_path: Path
) -> None:
    file = plugin_file(
        "early",
        "from saekit import Component, Result, UsageError, hookimpl\n"
        "class Early:\n"
        "    'Looks first.'\n"
        "    def __init__(self, *, refuse: bool = False):\n        self.refuse, self.seen = refuse, None\n"
        "    def prepare(self, context):\n"
        "        if self.refuse:\n            raise UsageError('prompts: too long. Shorten them.')\n"
        "        self.seen = context.source.d_in\n"
        "    def __call__(self, context):\n        return Result(scalars={'seen': self.seen})\n"
        "@hookimpl\ndef saekit_analyzers():\n    yield Component('early', Early)\n",
    )
    done = runs("refused", "--plugin", str(file), analyzer=[{"use": "early", "refuse": True}])
    assert done.code == 2
    done.says("prompts: too long")
    assert not (tmp_path / "refused" / "sae").exists()
    done = runs("seen", "--plugin", str(file), analyzer=[{"use": "early"}])
    assert done.code == 0, done.err
    assert json.loads(done.out)["analysis"]["early"] == {"seen": 16}
