"""`[graph]`: built of the trained SAE as it stands on disk, before it is measured; each SAE of a run has its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Outcome

import saekit
from saekit import FeatureGraph

PLUGIN = """
import torch
from saekit import Component, FeatureGraph, Result, hookimpl

def together(sae, codes, *, at_least: int = 1):
    '''Latents that fire in one row: an edge each way, its weight the number of rows.'''
    counts, rows = torch.zeros(sae.d_sae, sae.d_sae), 0
    for code in codes:
        assert not torch.is_inference_mode_enabled()
        fired = (code.dense() != 0).float()
        counts += fired.T @ fired
        rows += len(code)
    counts.fill_diagonal_(0)
    edges = (counts >= at_least).nonzero().T.contiguous()
    return FeatureGraph.of(sae, edges, counts[edges[0], edges[1]])

def reads_no_codes(sae, codes):
    return FeatureGraph.of(sae, torch.tensor([[0], [1]]), torch.ones(1))

def stale(sae, codes):
    graph = reads_no_codes(sae, codes)
    graph.dictionary = "0" * 64
    return graph

def no_graph(sae, codes):
    return sae.W_dec

def raises(sae, codes):
    next(codes)
    raise ZeroDivisionError("no rows")

def count_codes(sae, codes):
    sizes = [len(code) for code in codes]
    return FeatureGraph.of(sae, torch.tensor([[0], [1]]), torch.tensor([float(sum(sizes))]))

def edges(context):
    '''How many edges the graph has.'''
    context.graph.require(context.sae)
    return Result(scalars={"edges": context.graph.edge_index.shape[1], "weight": float(context.graph.weight.sum())})

class Degree:
    '''The mean number of neighbours.'''
    def prepare(self, context):
        self.graph = context.graph
    def update(self, step):
        self.graph.require(step.sae)
    def compute(self):
        return {"degree": self.graph.edge_index.shape[1] / self.graph.nodes}

def pull(step):
    return step.error.mean()

@hookimpl
def saekit_graph_builders():
    for builder in (together, reads_no_codes, stale, no_graph, raises, count_codes):
        yield Component(builder.__name__, builder)

@hookimpl
def saekit_analyzers():
    yield Component("edges", edges, needs=("graph",))

@hookimpl
def saekit_metrics():
    yield Component("degree", Degree, needs=("graph",), default=True)

@hookimpl
def saekit_losses():
    yield Component("pull", pull, needs=("graph",))
"""


@pytest.fixture
def graphs(
    command: Callable[..., Outcome],
    run_file: Callable[..., Path],
    plugin_file: Callable[[str, str], Path],
    tmp_path: Path,
) -> Callable[..., Outcome]:
    """A run with the plugin above, in `tmp_path / "run"`."""

    def run(*arguments: str, **changes: Any) -> Outcome:
        file = run_file(**changes)
        return command(
            "run",
            file,
            "--plugin",
            plugin_file("graphs", PLUGIN),
            "--directory",
            tmp_path / "run",
            "--json",
            *arguments,
        )

    return run


def test_a_graph_reaches_analyzers_and_metrics_and_belongs_to_the_sae_on_disk(
    graphs: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = graphs(graph={"use": "together", "tokens": 300}, analyzer=[{"use": "edges"}])
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    graph = FeatureGraph.load(tmp_path / "run" / "graph.safetensors")
    graph.require(saekit.load_sae(tmp_path / "run" / "sae"))
    assert graph.builder == "graphs.together"
    # Every row has k = 4 latents or fewer, so each gives 4 * 3 ordered pairs at most.
    assert 0 < float(graph.weight.sum()) <= 300 * 12
    assert graph.edge_index.flip(0).T.unique(dim=0).equal(graph.edge_index.T.unique(dim=0))
    edges = graph.edge_index.shape[1]
    assert summary["graph"] == {"builder": "graphs.together", "nodes": 64, "edges": edges}
    assert summary["analysis"]["edges"] == {"edges": edges, "weight": float(graph.weight.sum())}
    assert summary["metrics"]["degree"] == edges / 64
    assert summary["seconds"]["graph"] >= 0
    again = tmp_path / "run" / "run.toml"
    assert "[graph]" in again.read_text() and "tokens = 300" in again.read_text()


def test_a_builder_has_as_many_codes_as_the_run_file_says(graphs: Callable[..., Outcome], tmp_path: Path) -> None:
    assert graphs("--graph", "count_codes:tokens=333").code == 0  # of batches of 64, in blocks of 512
    assert FeatureGraph.load(tmp_path / "run" / "graph.safetensors").weight.tolist() == [333.0]


def test_by_default_as_many_as_the_metrics_see(graphs: Callable[..., Outcome], tmp_path: Path) -> None:
    assert graphs("-o", "graph.use=count_codes").code == 0
    assert FeatureGraph.load(tmp_path / "run" / "graph.safetensors").weight.tolist() == [500.0]


def test_without_the_section_there_is_no_graph(graphs: Callable[..., Outcome], tmp_path: Path) -> None:
    done = graphs()
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["graph"] is None
    assert "degree" not in summary["metrics"] and "graph" not in summary["seconds"]
    assert not (tmp_path / "run" / "graph.safetensors").exists()


def test_each_variant_has_a_graph_of_its_own(graphs: Callable[..., Outcome], tmp_path: Path) -> None:
    variants = [
        {"name": "few", "graph": {"at_least": 4}},
        {"name": "wide", "architecture": {"d_sae": 96}},
        {"name": "other", "graph": {"use": "reads_no_codes"}},
    ]
    done = graphs(graph={"use": "together", "tokens": 300}, analyzer=[{"use": "edges"}], variant=variants)
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["graph"] is None
    assert not (tmp_path / "run" / "graph.safetensors").exists()
    found = {}
    for name in ("few", "wide", "other"):
        place = tmp_path / "run" / "variants" / name
        found[name] = FeatureGraph.load(place / "graph.safetensors")
        found[name].require(saekit.load_sae(place / "sae"))
        assert summary["variants"][name]["analysis"]["edges"]["edges"] == found[name].edge_index.shape[1]
    assert len(found["few"].weight) > 0 and bool((found["few"].weight >= 4).all())
    assert [found[name].nodes for name in found] == [64, 96, 64]
    assert found["other"].builder == "graphs.reads_no_codes"


@pytest.mark.parametrize(
    ("builder", "words"),
    [
        ("stale", ("a graph of another dictionary",)),
        ("no_graph", ("returned Parameter, not a saekit.FeatureGraph",)),
        ("raises", ("ZeroDivisionError: no rows",)),
    ],
)
def test_a_builder_that_fails_is_named_and_the_sae_is_kept(
    builder: str, words: tuple[str, ...], graphs: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = graphs("--graph", builder)
    assert done.code == 3
    done.says(f"graph_builder '{builder}' of plugin 'graphs'", *words, "Fix it")
    assert (tmp_path / "run" / "sae" / "cfg.json").is_file()
    assert not (tmp_path / "run" / "graph.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"analyzer": [{"use": "edges"}]}, ("analyzer.edges", "needs 'graph'", "[graph]", "together")),
        (
            {"graph": {"use": "together"}, "loss": [{"use": "mse"}, {"use": "pull"}]},
            ("loss.pull", "needs 'graph'", "built after training", "Leave 'pull' out"),
        ),
        ({"graph": {"use": "together", "at_lest": 1}}, ("graph.at_lest", "Did you mean 'at_least'")),
        ({"graph": {"use": "togther"}}, ("graph: there is no graph builder 'togther'", "Did you mean 'together'")),
        ({"graph": {"tokens": 5}}, ("graph.use", "is required")),
        ({"graph": {"use": "together", "tokens": 0}}, ("graph.tokens", "greater than 0")),
        ({"graph": {"use": "together", "tokens": True}}, ("graph.tokens", "a number is wanted")),
        ({"graph": [{"use": "together"}]}, ("graph: is not a table",)),
    ],
)
def test_the_plan_refuses_what_cannot_be(
    changes: dict[str, Any], words: tuple[str, ...], graphs: Callable[..., Outcome]
) -> None:
    done = graphs("--dry-run", **changes)
    assert done.code == 2
    done.says(*words)


def test_the_plan_shows_the_builder(graphs: Callable[..., Outcome]) -> None:
    plan = json.loads(graphs("--dry-run", "--graph", "together:at_least=2").out)
    (part,) = [part for part in plan["parts"] if part["key"] == "graph"]
    assert part["component"] == "graphs.together" and part["options"] == {"at_least": 2}


def test_a_graph_of_an_sae_that_is_there_already(graphs: Callable[..., Outcome], tmp_path: Path) -> None:
    assert graphs().code == 0
    done = graphs(
        "--directory", str(tmp_path / "again"),
        architecture={"use": "topk", "from": str(tmp_path / "run" / "sae")}, graph={"use": "together"}, training__tokens=0,
    )  # fmt: skip
    assert done.code == 0, done.err
    FeatureGraph.load(tmp_path / "again" / "graph.safetensors").require(saekit.load_sae(tmp_path / "run" / "sae"))
