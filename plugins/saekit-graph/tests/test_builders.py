"""The graph builders against dense references in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from saekit_graph import activation_graphs
from saekit_graph.activation_graphs import PMI, Coactivation, Correlation, Firings
from saekit_graph.cosine import Cosine, cosine_blocks
from saekit_graph.top_k_graph import top_k_graph
from torch import Tensor

from saekit import Code, DenseCode, FeatureGraph, Pattern, Registry, SparseAutoencoder, SparseCode, UsageError
from saekit.testing import make_step

D_SAE = 37


def an_sae(d_sae: int = D_SAE, d_in: int = 8, seed: int = 0) -> SparseAutoencoder:
    return make_step(d_in=d_in, d_sae=d_sae, options={"k": min(4, d_sae)}, seed=seed, dtype=torch.float64).sae


def some_codes(d_sae: int = D_SAE, batches: int = 5, seed: int = 0) -> tuple[list[Code], Tensor]:
    """Codes of odd sizes whose latents have very different densities, and the dense whole: latent 3 never fires, latents 5
    and 6 always do so together, latent 7 fires always."""
    draws = torch.Generator().manual_seed(seed)
    codes: list[Code] = []
    dense = []
    share = torch.linspace(0.02, 0.6, d_sae, dtype=torch.float64)
    for batch in range(batches):
        f = torch.rand(31 + batch, d_sae, generator=draws, dtype=torch.float64)
        f = torch.where(torch.rand(f.shape, generator=draws, dtype=torch.float64) < share, f, 0.0)
        f[:, 3] = 0.0
        f[:, 6] = 2 * f[:, 5]
        f[:, 7] = 1.0
        dense.append(f)
        pattern = Pattern.of_mask(f != 0)
        codes.append(DenseCode(f) if batch % 2 else SparseCode(pattern, f[pattern.rows, pattern.indices]))
    return codes, torch.cat(dense)


def jaccard(f: Tensor) -> Tensor:
    fires = (f != 0).double()
    both, n = fires.t() @ fires, fires.sum(0)
    return (both / (n[:, None] + n - both)).nan_to_num(0.0)


def pearson(f: Tensor) -> Tensor:
    centred = f - f.mean(0)
    norms = centred.norm(dim=0)
    return torch.where(norms[:, None] * norms > 1e-12, centred.t() @ centred / (norms[:, None] * norms), 0.0)


def information(least: int) -> Callable[[Tensor], Tensor]:
    def measure(f: Tensor) -> Tensor:
        fires = (f != 0).double()
        both, n = fires.t() @ fires, fires.sum(0)
        pmi = torch.log(both * len(f) / (n[:, None] * n))
        return torch.where(both >= least, pmi, 0.0)

    return measure


def assert_strongest(graph: FeatureGraph, measure: Tensor, k: int, above: float = 0.0) -> None:
    """Every latent has the k others with the largest measure, strongest first; among equal ones any will do."""
    measure = measure.clone().fill_diagonal_(-torch.inf)
    for latent in range(graph.nodes):
        found, weights = graph.neighbours(latent)
        expected = measure[latent].topk(min(k, graph.nodes - 1)).values
        expected = expected[expected > above + 1e-12]
        assert len(set(found.tolist())) == len(found) == len(expected)
        assert latent not in found.tolist()
        torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights.double(), measure[latent, found], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("elements", [1, 5 * D_SAE, 7 * D_SAE + 3, 10**6])
@pytest.mark.parametrize("k", [1, 4, 100])
def test_cosine_is_exact_in_blocks_of_any_size(k: int, elements: int) -> None:
    sae = an_sae()
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(D_SAE, 1, dtype=torch.float64) + 0.1)  # cosines do not see norms
        sae.W_dec[11] = 0.0
        sae.W_dec[12] = 3 * sae.W_dec[13]  # equal measures with every other row
    rows = sae.W_dec.detach()
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    inverse = torch.where(rows.norm(dim=1) > 0, 1 / rows.norm(dim=1), 0.0)
    graph = top_k_graph(sae, cosine_blocks(rows, inverse, elements), k=k)
    assert_strongest(graph, unit @ unit.t(), k)
    assert len(graph.neighbours(11)[0]) == 0
    graph.require(sae)


def test_cosine_takes_no_codes_and_refuses_a_decoder_that_is_not_finite() -> None:
    sae = an_sae()

    def refuse():
        raise AssertionError("it harvested activations")
        yield

    graph = Cosine(k=3, above=0.2)(sae, refuse())
    unit = sae.W_dec.detach()
    assert_strongest(graph, unit @ unit.t(), 3, above=0.2)
    with torch.no_grad():
        sae.W_dec[5, 2] = torch.nan
    with pytest.raises(UsageError, match="row 5"):
        Cosine()(sae, iter(()))


def test_cosine_of_one_latent_has_no_edges() -> None:
    assert Cosine()(an_sae(1), iter(())).edge_index.shape == (2, 0)


@pytest.mark.parametrize("elements", [1, 5 * D_SAE + 2, 10**6])
@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize(
    ("builder", "reference"),
    [(Correlation, pearson), (Coactivation, jaccard), (lambda k: PMI(k=k, least=3), information(3))],
    ids=["correlation", "coactivation", "pmi"],
)
def test_joint_measures_are_exact(
    monkeypatch: pytest.MonkeyPatch, builder, reference: Callable[[Tensor], Tensor], k: int, elements: int
) -> None:
    monkeypatch.setattr(Firings, "joint", lambda self, _=0, old=Firings.joint: old(self, elements))
    sae = an_sae()
    codes, f = some_codes()
    graph = builder(k=k)(sae, iter(codes))
    assert_strongest(graph, reference(f), k)
    assert len(graph.neighbours(3)[0]) == 0  # never fires
    assert not bool((graph.edge_index == 3).any())


def test_the_pair_that_always_fires_together_is_found() -> None:
    codes, _ = some_codes()
    for builder in (Correlation(k=1), Coactivation(k=1)):
        neighbours, weights = builder(an_sae(), iter(codes)).neighbours(5)
        assert neighbours.tolist() == [6]
        assert float(weights) == pytest.approx(1.0, abs=1e-6)


def test_a_latent_that_fires_always_has_no_correlation() -> None:
    codes, _ = some_codes()
    assert len(Correlation()(an_sae(), iter(codes)).neighbours(7)[0]) == 0


@pytest.mark.parametrize("builder", [Correlation(), Coactivation(), PMI()])
def test_without_codes_there_are_no_edges(builder) -> None:
    assert builder(an_sae(), iter(())).edge_index.shape == (2, 0)


def test_a_code_that_is_hardly_sparse_is_counted_on_fewer_activations() -> None:
    codes, f = some_codes()
    with pytest.warns(UserWarning, match="hardly sparse"):
        firings = Firings.of(iter(codes), D_SAE, np.float64, most=int((f[:63] != 0).sum()))
    assert firings.tokens == 63
    np.testing.assert_array_equal(firings.by_token.toarray(), f[:63].numpy())


def test_pmi_wants_pairs_seen_often_enough() -> None:
    codes, f = some_codes()
    many = PMI(k=100, least=20)(an_sae(), iter(codes))
    assert_strongest(many, information(20)(f), 100)
    assert many.edge_index.shape[1] < PMI(k=100, least=1)(an_sae(), iter(codes)).edge_index.shape[1]


def test_the_measure_is_never_held_whole() -> None:
    """Blocks have as many rows as fit, so a wide dictionary has many."""
    codes, _ = some_codes()
    sizes = [len(block) for _, block in Firings.of(iter(codes), D_SAE, np.int32).measured(lambda n, i, j: n, 4 * D_SAE)]
    assert sizes == [4] * 9 + [1]
    assert activation_graphs.BLOCK * 8 <= 1 << 26


@pytest.mark.parametrize("name", ["cosine", "correlation", "coactivation", "pmi"])
def test_options_are_validated(name: str) -> None:
    component = Registry().find("graph_builder", name)
    with pytest.raises(UsageError, match=r"graph\.k"):
        component.validate({"k": 0}, "graph")
    assert component.validate({}, "graph")["k"] == 10
