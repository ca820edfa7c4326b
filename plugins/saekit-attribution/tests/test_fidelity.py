"""The correlations are those of scipy, and undefined ones are None."""

from __future__ import annotations

import pytest
import torch
from saekit_attribution.effects.fidelity import fidelity, pearson, spearman, top_recall
from saekit_attribution.effects.methods import Attribution
from torch import Tensor


def attribution(scores: Tensor, error: float = 0.0, moved: float = 0.0) -> Attribution:
    m = len(scores)
    return Attribution(torch.arange(m), scores, torch.ones(m), scores, torch.ones(m), error, 1.0, moved)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(ties: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(50, generator=generator)
    other = one.exp() + torch.randn(50, generator=generator)
    if ties:
        one, other = one.round(), other.round()
    found = fidelity(attribution(one), attribution(other))
    assert found.spearman == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-9)
    assert found.pearson == pytest.approx(stats.pearsonr(one.double(), other.double()).statistic, abs=1e-9)
    assert found.spearman != pytest.approx(found.pearson, abs=1e-3)


def test_ties_share_the_mean_of_their_places() -> None:
    tied, places = torch.tensor([30.0, 10.0, 30.0, 20.0, 30.0]), torch.tensor([3.0, 0.0, 3.0, 1.0, 3.0])
    other = torch.tensor([2.0, 0.0, 1.0, 4.0, 3.0])
    assert spearman(tied, other) == pytest.approx(pearson(places, other), abs=1e-12)


@pytest.mark.parametrize(
    "scores", [[], [1.0], [1.0, 2.0], [0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0], [1.0, float("nan"), 2.0]], ids=str
)
def test_what_is_not_defined_is_none(scores: list[float]) -> None:
    exact = attribution(torch.arange(float(len(scores))))
    for one, other in ((attribution(torch.tensor(scores)), exact), (exact, attribution(torch.tensor(scores)))):
        found = fidelity(one, other)
        assert found.spearman is None
        assert found.pearson is None


def test_three_latents_are_enough_however_small_the_scores() -> None:
    small = torch.tensor([1e-9, 3e-9, 2e-9])
    assert pearson(small.double(), -small.double()) == pytest.approx(-1)
    assert spearman(small, -small) == pytest.approx(-1)


def test_the_completeness_gap_is_what_is_missing() -> None:
    estimate = attribution(torch.tensor([1.0, 2.0, -0.5]), error=0.25, moved=4.0)
    assert fidelity(estimate, estimate).completeness_gap == pytest.approx(2.75 - 4.0)


def test_other_latents_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="same latents"):
        fidelity(attribution(torch.ones(3)), attribution(torch.ones(4)))


def test_recall_is_what_the_near_zero_latents_flatter() -> None:
    """The estimate orders 190 latents without effect just as the exact effects do, and misses all ten that matter."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.rand(200, generator=generator).double() * 1e-3
    exact[:10] = torch.linspace(1, 2, 10)
    estimate = exact.clone()
    estimate[:10], estimate[10:20] = 0.0009, torch.linspace(1, 2, 10)
    found = fidelity(attribution(estimate), attribution(exact))
    assert found.spearman > 0.85
    assert found.recall == (0.0, 10 / 200)
    assert top_recall(exact, exact, 10) == (1.0, 0.05)
    estimate[:4], estimate[4:10], estimate[10:20] = exact[:4], 0.0, exact[10:20]
    assert top_recall(-estimate, exact, 10).share == pytest.approx(0.4), "the sign is not asked for, the size is"


def test_recall_counts_no_effect_of_zero_and_is_none_where_every_order_is_right() -> None:
    exact = torch.tensor([3.0, 0.0, 0.0, 0.0, 2.0])
    assert top_recall(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), exact, 4).share == pytest.approx(0.5)
    assert top_recall(exact, exact, 5) is None
    assert top_recall(exact, torch.zeros(5), 3) is None
    assert top_recall(torch.tensor([1.0, 2.0, float("nan")]), torch.ones(3), 1) is None
