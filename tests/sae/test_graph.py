"""`FeatureGraph`: what it holds, that it survives the disk, and that it is refused where it does not belong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saekit
from saekit import FeatureGraph
from saekit.builtin.architectures.topk import TopK
from saekit.errors import UsageError


def sae(d_sae: int = 5, seed: int = 0) -> TopK:
    made = TopK(4, d_sae, k=2)
    made.initialise(torch.Generator().manual_seed(seed), torch.zeros(1, 4))
    return made


def star(of: TopK) -> FeatureGraph:
    """Latents 1, 2 and 4 are neighbours of 0, and 0 of 2."""
    return FeatureGraph.of(
        of, torch.tensor([[1, 2, 4, 0], [0, 0, 0, 2]]), torch.tensor([0.5, 1.0, 0.25, 1.0]), "acme.star"
    )


def test_neighbours_are_those_with_an_edge_to_the_latent() -> None:
    graph = star(sae())
    latents, weights = graph.neighbours(0)
    assert latents.tolist() == [1, 2, 4]
    assert weights.tolist() == [0.5, 1.0, 0.25]
    assert [graph.neighbours(j)[0].tolist() for j in (1, 2, 3)] == [[], [0], []]
    with pytest.raises(IndexError, match="no latent 5: the graph has 5"):
        graph.neighbours(5)


def test_it_is_the_same_from_the_disk_and_differs_in_every_part(tmp_path: Path) -> None:
    graph = star(sae())
    graph.save(tmp_path / "a" / "graph.safetensors")
    assert FeatureGraph.load(tmp_path / "a" / "graph.safetensors") == graph
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["graph.safetensors"]
    edges, weight, digest = graph.edge_index, graph.weight, graph.dictionary
    for other in (
        FeatureGraph(6, edges, weight, digest, "acme.star"),
        FeatureGraph(5, edges.flip(0), weight, digest, "acme.star"),
        FeatureGraph(5, edges, weight * 2, digest, "acme.star"),
        FeatureGraph(5, edges[:, :3], weight[:3], digest, "acme.star"),
        FeatureGraph(5, edges, weight, "0" * 64, "acme.star"),
        FeatureGraph(5, edges, weight, digest, "acme.other"),
    ):
        assert graph != other
    assert graph != "a graph"


def test_a_graph_without_edges_is_a_graph(tmp_path: Path) -> None:
    graph = FeatureGraph.of(sae(), torch.zeros(2, 0, dtype=torch.long), torch.zeros(0))
    graph.save(tmp_path / "graph.safetensors")
    assert FeatureGraph.load(tmp_path / "graph.safetensors") == graph
    assert graph.neighbours(0)[0].tolist() == []


def test_a_stale_graph_is_refused_and_says_whose_it_is() -> None:
    one = sae()
    graph = star(one)
    graph.require(one)
    with pytest.raises(UsageError, match=r"acme\.star.*another dictionary.*Build it again from this SAE"):
        graph.require(sae(seed=1))
    with pytest.raises(UsageError, match="5 latents, but the SAE has 6"):
        graph.require(sae(d_sae=6))
    with torch.no_grad():
        one.b_enc.add_(1.0)  # which is not of the dictionary
    graph.require(one)
    with torch.no_grad():
        one.W_dec[3, 2] += 1e-6
    with pytest.raises(UsageError, match="another dictionary"):
        graph.require(one)


def test_a_graph_belongs_to_the_sae_that_is_read_back_from_the_disk(tmp_path: Path) -> None:
    made = sae()
    saekit.save_sae(made, tmp_path / "sae", name="builtin.topk")
    star(made).require(saekit.load_sae(tmp_path / "sae"))


@pytest.mark.parametrize(
    ("edges", "weight", "words"),
    [
        (
            torch.zeros(3, 2, dtype=torch.long),
            torch.zeros(2),
            r"int64 of shape \[2, E\], not torch.int64 of shape \[3, 2\]",
        ),
        (torch.zeros(2, 2), torch.zeros(2), "edge_index must be int64"),
        (torch.zeros(2, 2, dtype=torch.long), torch.zeros(3), r"shape \[2\], one for each edge, not .* \[3\]"),
        (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, dtype=torch.long), "weight must be floats"),
        (torch.tensor([[0, 5], [1, 1]]), torch.zeros(2), "latents 0 to 5, but there are 5"),
        (torch.tensor([[0, -1], [1, 1]]), torch.zeros(2), "latents -1 to 1, but there are 5"),
    ],
)
def test_edges_that_cannot_be_are_refused(edges: torch.Tensor, weight: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FeatureGraph(5, edges, weight, "0" * 64)


def test_a_file_that_is_no_graph_or_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    with pytest.raises(UsageError, match=r"graph\.safetensors: there is no such file"):
        FeatureGraph.load(path)
    star(sae()).save(path)
    tensors = load_file(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UsageError, match=r"graph\.safetensors: is damaged or cut short"):
        FeatureGraph.load(path)
    save_file(tensors, path)
    with pytest.raises(UsageError, match="is not a feature graph"):
        FeatureGraph.load(path)
    save_file(tensors, path, {"format": "saekit feature graph 1", "nodes": "5"})
    with pytest.raises(UsageError, match="is damaged"):
        FeatureGraph.load(path)
