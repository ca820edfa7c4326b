"""To and from torch_geometric, and the propagation against its dense formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saekit_graph.propagation import Propagation, normalised_weight
from saekit_graph.pyg import from_pyg, to_pyg
from torch import Tensor

from saekit import DenseCode, FeatureGraph, Pattern, SparseCode, UsageError
from saekit.testing import make_step


@st.composite
def graphs(draw: st.DrawFn) -> FeatureGraph:
    nodes = draw(st.integers(1, 12))
    pairs = draw(st.lists(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)), max_size=40, unique=True))
    weights = draw(st.lists(st.floats(0.125, 4.0, width=32), min_size=len(pairs), max_size=len(pairs)))
    edges = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).t()
    return FeatureGraph(nodes, edges, torch.tensor(weights), draw(st.text(max_size=5)), draw(st.text(max_size=5)))


def dense(graph: FeatureGraph) -> Tensor:
    """A [nodes, nodes] float64: row i has the shares of i's neighbours."""
    matrix = torch.zeros(graph.nodes, graph.nodes, dtype=torch.float64)
    for (j, i), w in zip(graph.edge_index.t().tolist(), graph.weight.tolist(), strict=True):
        matrix[i, j] += w
    return matrix / matrix.sum(1, keepdim=True).clamp_min(1e-300)


@given(graphs())
@settings(deadline=None, max_examples=50)
def test_a_graph_comes_back_as_it_went(graph: FeatureGraph) -> None:
    data = to_pyg(graph)
    assert data.num_nodes == graph.nodes
    assert from_pyg(data) == graph
    assert from_pyg(data.clone()) == graph


def test_a_stale_graph_is_refused() -> None:
    sae = make_step().sae
    other = make_step().sae
    with torch.no_grad():
        other.W_dec[0, 0] += 1e-3
    edges = torch.tensor([[1], [0]])
    data = to_pyg(FeatureGraph.of(sae, edges, torch.ones(1)))
    from_pyg(data).require(sae)
    with pytest.raises(UsageError, match="another dictionary"):
        from_pyg(data).require(other)
    with pytest.raises(UsageError, match="another dictionary"):
        Propagation(from_pyg(data), other)


def test_data_that_says_too_little_is_refused_with_the_fix() -> None:
    from torch_geometric.data import Data

    edges = torch.tensor([[1], [0]])
    with pytest.raises(UsageError, match="data.dictionary"):
        from_pyg(Data(edge_index=edges, num_nodes=2))
    with pytest.raises(UsageError, match="edge_index"):
        from_pyg(Data(x=torch.zeros(2, 1), dictionary="d"))
    with pytest.raises(ValueError, match="one row for each"):
        to_pyg(FeatureGraph(2, edges, torch.ones(1), "d"), torch.zeros(3, 1))


def test_edges_without_a_weight_weigh_one() -> None:
    from torch_geometric.data import Data

    graph = from_pyg(Data(edge_index=torch.tensor([[1, 2], [0, 0]]), num_nodes=3, dictionary="d"))
    assert graph.weight.tolist() == [1.0, 1.0]


def test_torch_geometric_understands_the_direction_of_edges() -> None:
    """A message of torch_geometric goes to the latent whose neighbour it comes from."""
    from torch_geometric.nn import LGConv

    graph = FeatureGraph(3, torch.tensor([[1, 2], [0, 0]]), torch.tensor([1.0, 3.0]), "d")
    data = to_pyg(graph, torch.tensor([[0.0], [10.0], [100.0]]))
    out = LGConv(normalize=False)(data.x, data.edge_index, data.edge_weight)
    assert out.flatten().tolist() == [310.0, 0.0, 0.0]


@given(graphs().filter(lambda graph: graph.edge_index.shape[1] > 0), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_propagation_is_the_dense_formula_with_its_gradient(graph: FeatureGraph, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    f = torch.randn(5, graph.nodes, generator=draws, dtype=torch.float64, requires_grad=True)
    back = torch.randn(5, graph.nodes, generator=draws, dtype=torch.float64)
    propagation = Propagation(graph)
    # The shares are float32, as the weights are: the reference takes the same, in float64.
    matrix = torch.zeros(graph.nodes, graph.nodes, dtype=torch.float64)
    matrix.index_put_((graph.edge_index[1], graph.edge_index[0]), propagation.weight.double(), accumulate=True)
    torch.testing.assert_close(matrix, dense(graph), atol=1e-6, rtol=0)
    expected = (f @ matrix.t()).relu()
    g = propagation(f)
    torch.testing.assert_close(g, expected, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(out, f, back)[0] for out in (g, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@given(graphs().filter(lambda graph: graph.edge_index.shape[1] > 0), st.data())
@settings(deadline=None, max_examples=50)
def test_a_few_latents_of_a_sparse_code_are_as_in_the_whole(graph: FeatureGraph, data: st.DataObject) -> None:
    latents = torch.tensor(data.draw(st.lists(st.integers(0, graph.nodes - 1), min_size=1, max_size=6)))
    f = torch.randn(4, graph.nodes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).relu()
    propagation = Propagation(graph)
    results = []
    for sparse in (True, False):
        leaf = f.clone().requires_grad_(True)
        pattern = Pattern.of_mask(f != 0)
        code = SparseCode(pattern, leaf[pattern.rows, pattern.indices]) if sparse else DenseCode(leaf)
        g = propagation.at(code, latents)
        (gradient,) = torch.autograd.grad(g.square().sum(), leaf)
        results.append((g, gradient))
    whole = propagation(f)[:, latents]
    for g, _ in results:
        torch.testing.assert_close(g, whole, atol=1e-12, rtol=0)
    active = f != 0  # a compressed code has no gradient where it has no entry
    torch.testing.assert_close(results[0][1][active], results[1][1][active], atol=1e-12, rtol=0)


def test_an_empty_graph_propagates_nothing_and_says_so() -> None:
    with pytest.raises(UsageError, match="no edges"):
        Propagation(FeatureGraph(3, torch.empty(2, 0, dtype=torch.long), torch.empty(0), "d"))


def test_negative_weights_are_no_shares() -> None:
    with pytest.raises(ValueError, match="negative"):
        normalised_weight(FeatureGraph(2, torch.tensor([[1], [0]]), torch.tensor([-1.0]), "d"))


def test_the_symmetric_normalisation_would_be_another_map() -> None:
    from torch_geometric.nn import LGConv

    graph = FeatureGraph(3, torch.tensor([[1, 2, 2], [0, 0, 1]]), torch.tensor([1.0, 3.0, 1.0]), "d")
    f = torch.tensor([[1.0, 2.0, 5.0]])
    symmetric = LGConv()(f.t(), graph.edge_index, graph.weight).t().relu()
    assert not torch.allclose(Propagation(graph)(f), symmetric)
