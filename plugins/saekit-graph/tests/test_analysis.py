"""The analyzers `communities` and `explain_neighbours`."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_graph.communities import Communities, rewire, undirected
from saekit_graph.explain import ExplainNeighbours, exact_shares, gnn_explainer_mask, rank_agreement
from saekit_graph.propagation import Propagation

from saekit import FeatureGraph, RunContext, UsageError
from saekit.testing import tiny_run

GROUPS, SIZE = 8, 8


def planted(sae: Any, seed: int = 0, inside: float = 0.9) -> FeatureGraph:
    """A graph over 64 latents, in groups of eight that keep most of their edges to themselves."""
    draws = torch.Generator().manual_seed(seed)
    n = GROUPS * SIZE
    group = torch.arange(n) // SIZE
    same = group[:, None] == group[None, :]
    share = torch.where(same, inside, 0.03)
    edges = ((torch.rand(n, n, generator=draws) < share) & ~torch.eye(n, dtype=torch.bool)).nonzero().t().contiguous()
    return FeatureGraph.of(sae, edges, 0.2 + torch.rand(edges.shape[1], generator=draws))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    place = tmp_path_factory.mktemp("graph")
    return tiny_run(place, graph={"use": "graph.cosine", "k": 6, "tokens": 500}).context


def with_graph(context: RunContext, graph: FeatureGraph) -> RunContext:
    return dataclasses.replace(context, graph=graph)


def test_planted_groups_are_found_and_rewired_ones_are_not(context: RunContext) -> None:
    result = Communities(latents=[3, 20])(with_graph(context, planted(context.sae)))
    assert result.scalars["communities"] == GROUPS
    assert result.scalars["modularity"] > result.scalars["modularity_rewired"] + 0.2
    assert result.scalars["agglomerative_modularity"] > 0.4
    for latent in (3, 20):
        rows = [row for row in result.tables["members"] if row["of"] == latent and row["method"] == "louvain"]
        first = latent // SIZE * SIZE
        assert {row["member"] for row in rows} == set(range(first, first + SIZE))
        assert rows[0]["member"] == latent
        assert all(0.4 < row["purity"] <= 1 for row in rows)
    assert sum(row["size"] for row in result.tables["communities"]) == GROUPS * SIZE
    assert len(result.notes) == 1 and " exceeds its controls: 5 rewired graphs reach " in result.notes[0]


def test_a_graph_without_groups_is_said_to_have_none(context: RunContext) -> None:
    notes = []
    for seed in range(4):  # random graphs: against six rewired ones, one in seven is the best of its kind by chance
        graph = planted(context.sae, seed=seed, inside=0.1)
        notes += Communities(rewired=6)(with_graph(context, graph)).notes
    assert sum("exceed its controls" in note for note in notes) >= 3


def test_rewiring_keeps_degrees_and_weights_and_no_edge_stands_twice(context: RunContext) -> None:
    G = undirected(planted(context.sae))
    other = rewire(G, 0)
    assert dict(G.degree) == dict(other.degree)
    assert sorted(w for *_, w in G.edges(data="weight")) == sorted(w for *_, w in other.edges(data="weight"))
    assert len(set(G.edges) & set(other.edges)) < 0.6 * G.number_of_edges()
    assert not any(a == b for a, b in other.edges)


def test_a_pair_weighs_the_mean_of_both_ways() -> None:
    graph = FeatureGraph(4, torch.tensor([[0, 1, 2], [1, 0, 1]]), torch.tensor([1.0, 3.0, 5.0]), "d")
    assert dict(undirected(graph).edges) == {(0, 1): {"weight": 2.0}, (1, 2): {"weight": 2.5}}


def test_wide_graphs_do_without_agglomerative_clusters_and_say_so(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saekit_graph.communities.LARGEST", 10)
    result = Communities()(with_graph(context, planted(context.sae)))
    assert result.scalars["agglomerative_modularity"] is None
    assert any("left out" in note for note in result.notes)


@pytest.mark.parametrize("analyzer", [Communities, ExplainNeighbours])
def test_stale_and_empty_graphs_and_wrong_latents_are_refused(context: RunContext, analyzer: Any) -> None:
    graph = planted(context.sae)
    stale = FeatureGraph(graph.nodes, graph.edge_index, graph.weight, "0" * 64)
    empty = FeatureGraph.of(context.sae, torch.empty(2, 0, dtype=torch.long), torch.empty(0))
    with pytest.raises(UsageError, match="another dictionary"):
        analyzer()(with_graph(context, stale))
    with pytest.raises(UsageError, match="no edges"):
        analyzer()(with_graph(context, empty))
    with pytest.raises(UsageError, match=r"latents: \[64\]"):
        analyzer(latents=[64])(with_graph(context, graph))


def some_star(seed: int = 0, n: int = 10, rows: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes of the neighbours [rows, n], shares of their edges [n]) with drives of very different sizes."""
    draws = torch.Generator().manual_seed(seed)
    A = torch.softmax(torch.rand(n, generator=draws), 0)
    density, scale = torch.rand(n, generator=draws) ** 2, 3 * torch.rand(n, generator=draws)
    f = torch.rand(rows, n, generator=draws) * (torch.rand(rows, n, generator=draws) < density) * scale
    return f, A


def test_exact_shares_are_what_taking_a_neighbour_away_takes_from_g() -> None:
    f, A = some_star()
    n = len(A)
    edges = torch.stack([torch.arange(n), torch.full((n,), n)])
    propagation = Propagation(FeatureGraph(n + 1, edges, A, "d"))
    whole = torch.cat([f, torch.zeros(len(f), 1)], 1)
    g = propagation(whole)[:, n].sum()
    for j in range(n):
        without = whole.clone()
        without[:, j] = 0.0
        lost = (g - propagation(without)[:, n].sum()) / g
        assert float(lost) == pytest.approx(float(exact_shares(f, A)[j]), abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_gnn_explainer_agrees_with_the_exact_shares_and_not_with_weights_alone(seed: int) -> None:
    f, A = some_star(seed)
    exact = exact_shares(f, A)
    mask = gnn_explainer_mask(f, A, seed=seed)
    assert rank_agreement(mask, exact) > 0.8
    assert rank_agreement(A, exact) < 0.7
    assert torch.equal(mask, gnn_explainer_mask(f, A, seed=seed))
    assert torch.allclose(mask, gnn_explainer_mask(100 * f, A, seed=seed), atol=1e-3)  # not of the code's units


def test_the_neighbours_of_a_run_are_explained(context: RunContext) -> None:
    result = ExplainNeighbours(latents=[0, 1, 2], epochs=50)(context)
    explained = {row["latent"] for row in result.tables["neighbours"]}
    assert len(explained) == result.scalars["explained"] > 0
    for latent in explained:
        rows = [row for row in result.tables["neighbours"] if row["latent"] == latent]
        assert sum(row["share"] for row in rows) == pytest.approx(1.0)
        assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    assert len(explained) + len(result.notes) - 1 == 3
    assert "has a single control beside it" in result.notes[0]


def test_a_latent_whose_neighbours_are_silent_has_its_reason(context: RunContext) -> None:
    sae = copy.deepcopy(context.sae)
    with torch.no_grad():
        sae.b_enc[9] = -1e6
    graph = FeatureGraph.of(sae, torch.tensor([[9], [4]]), torch.ones(1))
    result = ExplainNeighbours(latents=[4, 5])(dataclasses.replace(context, sae=sae, graph=graph))
    assert result.scalars == {"explained": 0, "rank_agreement": None, "rank_agreement_of_weights": None}
    assert "none of which fires" in result.notes[0]
    assert "has no neighbours" in result.notes[1]


def test_the_run_file_of_the_readme_runs(tmp_path: Path) -> None:
    import tomllib

    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = tomllib.loads(readme.split("```toml\n")[1].split("```")[0])
    callback = {**table["callback"][0], "start": 3, "every": 4}
    kept = {key: table[key] for key in ("graph", "analyzer", "loss")}
    run = tiny_run(tmp_path, **{**kept, "callback": [callback]})
    assert set(run.summary["analysis"]) == {"communities", "explain_neighbours"}
