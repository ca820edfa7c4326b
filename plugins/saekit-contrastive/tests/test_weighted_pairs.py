from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saekit_contrastive.tiled import contrastive_loss, weighted_contrastive_loss

DOUBLE = torch.float64


class Table:
    """Pairs whose weights are written down: [columns, n, n] each."""

    def __init__(self, weights, factors):
        self.weights, self.factors, self.columns = weights, factors, len(weights)

    def tile(self, rows, column):
        return self.weights[column, rows].clone(), self.factors[column, rows].log()


def unit(n, d, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=draws, dtype=DOUBLE), dim=1).requires_grad_()


def written(z, weights, factors, temperature):
    columns = []
    for w, b in zip(weights, factors, strict=True):
        rows = []
        for i in range(len(z)):
            others = [j for j in range(len(z)) if j != i]
            total = sum(w[i, j] for j in others)
            below = [b[i, j] * torch.exp(z[i] @ z[j] / temperature) for j in others if b[i, j] > 0]
            if total > 0 and below:
                above = sum(w[i, j] / total * (z[i] @ z[j]) / temperature for j in others)
                rows.append(torch.stack(below).sum().log() - above)
        if rows:
            columns.append(torch.stack(rows).mean())
    return torch.stack(columns).mean() if columns else z.sum() * 0


@given(
    n=st.integers(1, 10), columns=st.integers(1, 3), rare=st.floats(0, 1), tile=st.integers(1, 11),
    temperature=st.sampled_from([0.07, 1.0]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_weighted_pairs_equal_the_written_formula(n, columns, rare, tile, temperature, seed) -> None:
    draws = torch.Generator().manual_seed(seed)
    weights, factors, here, there = torch.rand(4, columns, n, n, generator=draws, dtype=DOUBLE)
    weights, factors = weights * (here > rare), 3 * factors * (there > rare / 2)
    z = unit(n, 4, seed)
    value = weighted_contrastive_loss(z, Table(weights, factors), temperature=temperature, tile=tile)
    expected = written(z, weights, factors, temperature)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    (found,), (wanted,) = torch.autograd.grad(value, z), torch.autograd.grad(expected, z)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_weights_are_normalised_for_each_anchor() -> None:
    z, weights = unit(8, 3), torch.rand(1, 8, 8, dtype=DOUBLE)
    scaled = weights * torch.logspace(-6, 6, 8, dtype=DOUBLE)[None, :, None]
    ones = torch.ones_like(weights)
    value, same = (weighted_contrastive_loss(z, Table(w, ones), temperature=0.1) for w in (weights, scaled))
    torch.testing.assert_close(value, same, rtol=1e-12, atol=1e-12)


def test_weights_of_one_are_the_loss_of_groups() -> None:
    z, groups = unit(9, 3), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 1])[:, None]
    same = (groups == groups.T).to(DOUBLE)[None]
    value = weighted_contrastive_loss(z, Table(same, torch.ones_like(same)), temperature=0.1, tile=4)
    torch.testing.assert_close(value, contrastive_loss(z, groups, temperature=0.1), rtol=1e-12, atol=1e-12)


class ByDistance:
    columns = 2

    def __init__(self, values):
        self.values = values  # [n, 2]

    def tile(self, rows, column):
        p = self.values[:, column]
        weights = (1 - (p[rows, None] - p[None]).abs()).clamp_min(0)
        return weights, torch.zeros_like(weights)


@pytest.mark.parametrize("n", [300, 600])
def test_memory_grows_with_the_number_of_rows(n, largest) -> None:
    z = unit(n, 8)
    with largest as seen:
        weighted_contrastive_loss(z, ByDistance(torch.rand(n, 2, dtype=DOUBLE)), temperature=0.1, tile=16).backward()
    assert seen.elements == 16 * n
