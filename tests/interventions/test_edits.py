"""Edits on their own: units, what is refused, and the edited code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interventions.models import D_SAE, D, make_sae

import saekit
from saekit import DenseCode, SparseCode, UsageError
from saekit.interventions.edits import EditTable, replaced_columns
from saekit.sae.kernels import Pattern


def edited(edit, values, statistics=None):
    table = EditTable({2: edit}, 5, statistics)
    return table(torch.tensor(values)[:, None], lambda t: t.reshape(-1))[:, 0].tolist()


def test_what_each_edit_gives() -> None:
    values = [0.0, 1.0, 4.0]
    assert edited(saekit.add(2), values) == [2, 3, 6]
    assert edited(saekit.add(-2), values) == [-2, -1, 2]
    assert edited(saekit.set_to(3), values) == [3, 3, 3]
    assert edited(saekit.scale(0.5), values) == [0, 0.5, 2]
    assert edited(saekit.ablate(), values) == [0, 0, 0]
    assert edited(saekit.clamp(0.5, 2), values) == [0.5, 1, 2]
    assert edited(saekit.clamp(high=2), values) == [0, 1, 2]
    assert edited(saekit.clamp(low=2), values) == [2, 2, 4]
    assert edited(lambda v: v**2, values) == [0, 1, 16]
    assert edited(saekit.add(torch.tensor([1.0, 2.0, 3.0])), values) == [1, 3, 7]
    assert edited(saekit.set_to(0.1), [7.3]) == [pytest.approx(0.1)]


@pytest.mark.parametrize("given_as", [lambda t: t, lambda t: {2: float(t[2])}])
def test_units_are_those_of_the_latent(given_as) -> None:
    statistics = {"max": given_as(torch.tensor([9.0, 9, 4, 9, 9])), "rms": given_as(torch.tensor([9.0, 9, 2, 9, 9]))}
    values = [1.0, 8.0]
    assert edited(saekit.add(1.5, unit="max"), values, statistics) == [7, 14]
    assert edited(saekit.set_to(2, unit="rms"), values, statistics) == [4, 4]
    assert edited(saekit.clamp(0.5, 1.5, unit="max"), values, statistics) == [2, 6]
    assert edited(saekit.clamp(high=1.5, unit="max"), values, statistics) == [1, 6]
    assert edited(saekit.add(torch.tensor([1.0, 2.0]), unit="max"), values, statistics) == [5, 16]
    assert edited(saekit.add(1.5), values, statistics) == [2.5, 9.5]


def test_statistics_are_those_of_the_codes() -> None:
    sae = make_sae("topk", torch.randn(1, 40, D))
    x = torch.randn(90, D)
    code = sae.encode(x).dense().double()
    expected_rms = (code.square().sum(0) / (code != 0).sum(0).clamp_min(1)).sqrt()
    for batches in (x, x.split(32), (batch.half() for batch in x.half().split(7))):
        found = saekit.latent_statistics(sae, batches)
        tolerance = 1e-6 if isinstance(batches, (torch.Tensor, tuple)) else 0.05
        torch.testing.assert_close(found["max"], code.amax(0), rtol=tolerance, atol=tolerance)
        if tolerance < 0.05:  # half precision changes which latents fire
            torch.testing.assert_close(found["rms"], expected_rms, rtol=1e-6, atol=1e-6)
    dead = (code.amax(0) == 0).nonzero()[:, 0].tolist()
    assert all(found["max"][latent] >= 0 for latent in dead)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: saekit.add(float("nan")), "add: strength must be finite, not nan"),
        (lambda: saekit.add(float("inf")), "add: strength must be finite, not inf"),
        (lambda: saekit.set_to("big"), "set_to: value must be a number or a tensor, not 'big'"),
        (lambda: saekit.scale(None), "scale: factor must be a number"),
        (lambda: saekit.scale(torch.tensor([1.0, float("nan")])), "factor contains numbers that are not finite"),
        (lambda: saekit.clamp(), "give low, high or both"),
        (lambda: saekit.clamp(2, 1), r"low is 2 and high is 1. Swap them"),
        (lambda: saekit.clamp(float("nan"), 1), "a bound must be finite"),
        (lambda: saekit.clamp(torch.ones(2), 1), "a bound must be a number"),
        (lambda: saekit.add(1, unit="mean"), "unit must be one of 'absolute', 'max', 'rms', not 'mean'"),
    ],
)
def test_what_cannot_be_meant_is_refused_where_it_is_written(make, message) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_an_edit_says_what_it_is() -> None:
    assert repr(saekit.add(1.5, unit="max")) == "add(1.5, unit='max')"
    assert repr(saekit.clamp(high=2)) == "clamp(-inf, 2)"
    assert repr(saekit.set_to(torch.ones(2, 3))) == "set_to(tensor [2, 3])"


@pytest.mark.parametrize("result", [torch.ones(3), 1.0, torch.ones(2, 1)])
def test_a_function_must_keep_the_shape(result) -> None:
    with pytest.raises(UsageError, match=r"edit of latent 2: the function returned .* for activations of shape \[2\]"):
        edited(lambda v: result, [1.0, 2.0])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 6), d_sae=st.integers(1, 10), share=st.floats(0, 1))
def test_the_edited_code_is_the_dense_one(seed: int, batch: int, d_sae: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, d_sae, generator=generator) < share
    pattern = Pattern.of_mask(mask)
    entries = torch.randn(len(pattern.indices), generator=generator, dtype=torch.float64, requires_grad=True)
    sparse = SparseCode(pattern, entries)
    latents = torch.randperm(d_sae, generator=generator)[: int(share * d_sae)]
    values = torch.randn(batch, len(latents), generator=generator, dtype=torch.float64, requires_grad=True)
    expected = sparse.dense().index_copy(1, latents, values)
    for code in (sparse, DenseCode(sparse.dense())):
        changed = replaced_columns(code, latents, values)
        assert type(changed) is type(code)
        assert torch.equal(changed.dense(), expected)
        probe = torch.randn(batch, d_sae, generator=generator, dtype=torch.float64)
        for wanted in (entries, values):
            (ours,) = torch.autograd.grad((changed.dense() * probe).sum(), wanted, retain_graph=True)
            (theirs,) = torch.autograd.grad((expected * probe).sum(), wanted, retain_graph=True)
            assert torch.equal(ours, theirs)


def test_no_edits_make_an_empty_table() -> None:
    table = EditTable({}, D_SAE)
    assert len(table) == 0 and table.latents.shape == (0,)
