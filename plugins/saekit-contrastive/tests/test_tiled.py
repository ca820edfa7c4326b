from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saekit_contrastive.tiled import LEFT_OUT, contrastive_loss


def dense(z, groups, temperature, decoupled=False, bank=None, bank_groups=None):
    """The formula, row by row, with autograd's own gradient."""
    others = z if bank is None else torch.cat([z, bank])
    all_groups = groups if bank is None else torch.cat([groups, bank_groups])
    columns = []
    for c in range(groups.shape[1]):
        rows = []
        for i in range(len(z)):
            known = [j for j in range(len(others)) if j != i and all_groups[j, c] != LEFT_OUT]
            positives = [j for j in known if all_groups[j, c] == groups[i, c]]
            below = [j for j in known if j not in positives] if decoupled else known
            if groups[i, c] == LEFT_OUT or not positives or not below:
                continue
            s = others @ z[i] / temperature
            if bank is not None:
                s = torch.cat([z, bank.detach()]) @ z[i] / temperature
            rows.append(torch.logsumexp(s[below], 0) - s[positives].mean())
        if rows:
            columns.append(torch.stack(rows).mean())
    return torch.stack(columns).mean() if columns else z.sum() * 0.0


@given(
    n=st.integers(1, 12),
    d=st.integers(1, 5),
    columns=st.integers(1, 3),
    n_groups=st.integers(1, 5),
    missing=st.floats(0, 0.6),
    m=st.integers(0, 5),
    tile=st.integers(1, 13),
    decoupled=st.booleans(),
    temperature=st.sampled_from([0.01, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_value_and_gradient_equal_the_dense_formula(
    n, d, columns, n_groups, missing, m, tile, decoupled, temperature, seed
) -> None:
    draws = torch.Generator().manual_seed(seed)
    z = torch.nn.functional.normalize(torch.randn(n, d, generator=draws, dtype=torch.float64), dim=1).requires_grad_()
    groups = torch.randint(0, n_groups, (n + m, columns), generator=draws)
    groups[torch.rand(n + m, columns, generator=draws) < missing] = LEFT_OUT
    more = {}
    if m:
        bank = torch.nn.functional.normalize(torch.randn(m, d, generator=draws, dtype=torch.float64), dim=1)
        more = {"bank": bank, "bank_groups": groups[n:]}
    value = contrastive_loss(z, groups[:n], temperature=temperature, decoupled=decoupled, tile=tile, **more)
    expected = dense(z, groups[:n], temperature, decoupled, **more)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    (found,) = torch.autograd.grad(3 * value, z)
    (wanted,) = torch.autograd.grad(3 * expected, z)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_two_rows_a_group_are_nt_xent() -> None:
    """As cross-entropy over all other rows (Chen et al. 2020, eq. 1)."""
    n = 6
    z = torch.nn.functional.normalize(torch.randn(2 * n, 8, dtype=torch.float64), dim=1)
    logits = (z @ z.t() / 0.2).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * n).roll(n)
    expected = torch.nn.functional.cross_entropy(logits, partner)
    groups = torch.arange(n).repeat(2)[:, None]
    torch.testing.assert_close(contrastive_loss(z, groups, temperature=0.2), expected)


def test_rows_without_a_positive_are_left_out_of_the_mean() -> None:
    """Dividing by all rows would let rows without a positive make the loss small for no reason."""
    z = torch.nn.functional.normalize(torch.randn(7, 4, dtype=torch.float64), dim=1).requires_grad_()
    groups = torch.tensor([0, 0, 0, 1, 2, LEFT_OUT, LEFT_OUT])[:, None]
    value = contrastive_loss(z, groups, temperature=0.5)
    s = z @ z.t() / 0.5
    others = [[j for j in range(5) if j != i] for i in range(3)]
    rows = [s[i, near].logsumexp(0) - s[i, near[:2]].mean() for i, near in enumerate(others)]
    torch.testing.assert_close(value, torch.stack(rows).mean())
    assert not torch.autograd.grad(value, z)[0][5:].any()


def test_the_row_itself_is_masked_before_the_maximum() -> None:
    """At a low temperature exp(s - s_ii) is zero for all others in float32, and its logarithm infinite."""
    z = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]), dim=1
    ).requires_grad_()
    groups = torch.tensor([0, 0, 1, 1])[:, None]
    value = contrastive_loss(z, groups, temperature=0.001)
    assert torch.isfinite(value) and torch.isfinite(torch.autograd.grad(value, z)[0]).all()
    torch.testing.assert_close(value, dense(z.double(), groups, 0.001).float())


@pytest.mark.parametrize("groups", [[LEFT_OUT] * 4, [0, 1, 2, 3]])
def test_nothing_to_compare_is_zero_with_a_gradient_of_zero(groups) -> None:
    z = torch.eye(4, requires_grad=True)
    value = contrastive_loss(z, torch.tensor(groups)[:, None], temperature=0.1)
    assert float(value.detach()) == 0.0 and not torch.autograd.grad(value, z)[0].any()


def test_nothing_of_the_number_of_rows_squared_is_held(largest) -> None:
    n, d, tile = 600, 8, 16
    z = torch.nn.functional.normalize(torch.randn(n, d), dim=1).requires_grad_()
    with largest as seen:
        contrastive_loss(z, torch.randint(0, 2, (n, 1)), temperature=0.1, tile=tile).backward()
    assert seen.elements == tile * n
