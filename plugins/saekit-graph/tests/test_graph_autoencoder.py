"""The graph autoencoder, on codes where neighbours determine each latent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from saekit_graph.graph_autoencoder import GraphAutoencoder, explained, train_graph_autoencoder
from saekit_graph.propagation import Propagation
from torch import Tensor

from saekit import Code, DenseCode, FeatureGraph, UsageError
from saekit.testing import tiny_run

GROUPS, SIZE = 10, 5


def planted(seed: int, rows: int = 600) -> list[Code]:
    """Codes whose latents, in groups of five, rise and fall together, each group's members in units of their own."""
    draws = torch.Generator().manual_seed(seed)
    drive = torch.rand(rows, GROUPS, generator=draws) * (torch.rand(rows, GROUPS, generator=draws) < 0.3)
    scale = torch.logspace(-1, 1, GROUPS * SIZE)
    f = drive.repeat_interleave(SIZE, 1) * scale * (1 + 0.1 * torch.randn(rows, GROUPS * SIZE, generator=draws))
    return [DenseCode(part.relu()) for part in f.split(200)]


def within_groups(shift: int = 0) -> FeatureGraph:
    """Each latent's neighbours are the others of its group; shift: those of another group."""
    n = GROUPS * SIZE
    pairs = [(a, b) for b in range(n) for a in range(n) if a // SIZE == (b // SIZE + shift) % GROUPS and a != b]
    return FeatureGraph(n, torch.tensor(pairs).t().contiguous(), torch.ones(len(pairs)), "d")


def share_explained(model: GraphAutoencoder | Propagation, codes: list[Code]) -> float:
    latents = torch.arange(GROUPS * SIZE)
    with torch.no_grad():
        g: Tensor = torch.cat([model.at(code, latents) for code in codes])
    return explained(g, torch.cat([code.dense() for code in codes]))


@pytest.mark.parametrize("kind", ["gcn", "gat"])
def test_it_learns_what_neighbours_say_and_nothing_from_strangers(kind: str) -> None:
    train, held_out = planted(0), planted(1)
    learned = share_explained(train_graph_autoencoder(within_groups(), train, kind=kind), held_out)
    strangers = share_explained(train_graph_autoencoder(within_groups(shift=1), train, kind=kind), held_out)
    assert learned > 0.8
    assert strangers < 0.1
    assert share_explained(Propagation(within_groups()), held_out) < learned  # the mean knows no units


@pytest.mark.parametrize("kind", ["gcn", "gat"])
def test_a_latents_own_activation_is_no_part_of_what_rebuilds_it(kind: str) -> None:
    model = train_graph_autoencoder(within_groups(), planted(0), kind=kind, steps=20)
    f = planted(1)[0].dense().requires_grad_(True)
    g = model.at(DenseCode(f), torch.tensor([7]))
    (gradient,) = torch.autograd.grad(g.sum(), f)
    assert not bool(gradient[:, 7].any())
    assert bool(gradient[:, [5, 6, 8, 9]].any())
    assert not bool(gradient[:, 10:].any())


@pytest.mark.parametrize("kind", ["gcn", "gat"])
def test_it_is_the_same_from_the_same_seed_and_for_compressed_codes(kind: str) -> None:
    first, second = (train_graph_autoencoder(within_groups(), planted(0), kind=kind, steps=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_graph_without_edges_is_refused() -> None:
    empty = FeatureGraph(GROUPS * SIZE, torch.empty(2, 0, dtype=torch.long), torch.empty(0), "d")
    with pytest.raises(UsageError, match="no edges"):
        train_graph_autoencoder(empty, planted(0), kind="gcn")


@pytest.mark.parametrize("propagation", ["mean", "gcn", "gat"])
def test_neighbours_that_fire_together_tell_more_than_strangers(tmp_path: Path, propagation: str) -> None:
    """In a tiny run 32 directions determine every latent, so latents that fire together predict each other."""
    analyzer = {"use": "graph.propagation", "propagation": propagation, "steps": 50, "tokens": 200}
    run = tiny_run(tmp_path, graph={"use": "correlation", "k": 3, "tokens": 2000}, analyzer=[analyzer])
    scalars = run.summary["analysis"]["propagation"]
    assert scalars["latents"] > 10
    assert scalars["r2"] > scalars["r2_control"]
    assert "its controls: " in run.summary["analysis_notes"]["propagation"][0]
