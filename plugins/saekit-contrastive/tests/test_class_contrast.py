from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saekit_contrastive import class_contrast
from saekit_contrastive.class_contrast import FORMS, contrast, contrasts, has_both_classes

SCALE_FREE = [form for form in FORMS if form not in ("activation", "raw")]


def drawn(n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=draws).double()
    labels = torch.where(labels == 2, torch.nan, labels)
    return torch.randn(n, generator=draws, dtype=torch.float64) + labels.nan_to_num(0.3), labels


@pytest.mark.parametrize("form", SCALE_FREE)
def test_a_scale_changes_neither_the_value_nor_is_there_a_slope_along_it(form) -> None:
    scores, labels = drawn()
    scores.requires_grad_()
    value = contrast(scores, labels, form=form, margin=0.5)
    torch.testing.assert_close(contrast(1000 * scores, labels, form=form, margin=0.5), value)
    (slope,) = torch.autograd.grad(value, scores)
    assert slope.abs().max() > 1e-3
    assert (slope * scores).sum().abs() < 1e-12


def test_raw_has_no_floor() -> None:
    """The form raw: the same separation at ten times the scale counts ten times as much."""
    scores, labels = drawn()
    value = contrast(scores, labels, form="raw")
    torch.testing.assert_close(contrast(10 * scores, labels, form="raw"), 10 * value)
    known = ~labels.isnan()
    expected = scores[known & (labels == 0)].mean() - scores[known & (labels == 1)].mean()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("form", FORMS)
def test_better_separated_is_better(form) -> None:
    labels = torch.tensor([1.0, 1.0, 0.0, 0.0])
    apart, mixed = torch.tensor([1.0, 0.9, -1.0, -0.9]), torch.tensor([1.0, -0.9, -1.0, 0.9])
    assert contrast(apart, labels, form=form) < contrast(mixed, labels, form=form)
    assert contrast(mixed, labels, form=form) < contrast(-apart, labels, form=form)


def test_hinge_asks_nothing_more_of_scores_beyond_the_margin() -> None:
    labels = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert contrast(torch.tensor([1.0, 0.6, -1.0, -0.7]), labels, form="hinge", margin=0.5) == 0
    assert contrast(torch.tensor([1.0, 0.1, -1.0, -0.7]), labels, form="hinge", margin=0.5) > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fill", [0.0, 1.0, torch.nan])
def test_one_class_alone_says_nothing(form, fill: float) -> None:
    labels = torch.full((5,), fill)
    assert contrast(torch.randn(5), labels, form=form) is None
    assert contrasts(torch.randn(5, 2), torch.stack([labels, labels], 1), form=form) is None
    assert not has_both_classes(labels[:, None])


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_a_label_take_no_part(form) -> None:
    scores, labels = drawn()
    known = ~labels.isnan()
    torch.testing.assert_close(contrast(scores, labels, form=form), contrast(scores[known], labels[known], form=form))


@pytest.mark.parametrize("form", FORMS)
def test_scores_of_zero_have_finite_gradients(form) -> None:
    scores = torch.zeros(4, requires_grad=True)
    value = contrast(scores, torch.tensor([1.0, 1.0, 0.0, 0.0]), form=form)
    assert value is not None
    (slope,) = torch.autograd.grad(value, scores)
    assert torch.isfinite(value) and torch.isfinite(slope).all()
    assert (slope[:2] < 0).all() and (slope[2:] > 0).all()


def test_a_column_without_both_classes_is_left_out_of_the_mean() -> None:
    scores, labels = drawn()
    both = torch.stack([labels, torch.ones_like(labels)], 1)
    torch.testing.assert_close(contrasts(torch.stack([scores, scores], 1), both), contrast(scores, labels))


@given(n=st.integers(4, 60), held=st.integers(1, 50), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_pairwise_in_pieces_is_the_mean_over_all_pairs(n: int, held: int, seed: int) -> None:
    scores, labels = drawn(n, seed)
    scores.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_contrast, "_PAIRS", held)
        value = contrast(scores, labels, form="pairwise", margin=0.3)
    if value is None:
        return
    known = ~labels.isnan()
    z = scores / scores[known].square().mean().sqrt()
    differences = z[labels == 1][:, None] - z[labels == 0][None, :]
    expected = torch.nn.functional.softplus(-differences / 0.3).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, scores), torch.autograd.grad(expected, scores))
