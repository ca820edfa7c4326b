from __future__ import annotations

import math

import pytest
import torch

from saekit import AgainstControls, matched_latents


def told(effect, *controls, higher: bool = True) -> str:
    return AgainstControls.of(effect, controls, higher=higher).sentence("gain", "other latents")


def test_an_effect_that_a_control_reaches_does_not_exceed_them() -> None:
    found = AgainstControls(2.88, (1.0, 2.0, 3.21))
    assert found.mean == pytest.approx(2.07) and found.spread == pytest.approx(1.10666, rel=1e-4)
    assert found.spreads == pytest.approx((2.88 - 2.07) / 1.10666, rel=1e-4)
    assert (found.exceeds, found.reaching, found.best) == (False, 1, 3.21)
    assert found.sentence("gain", "other latents") == (
        "The gain of 2.88 does not exceed its controls: 1 of 3 other latents reaches as much, up to 3.21 (mean 2.07, "
        "standard deviation 1.11; the effect is 0.73 of them above the mean)."
    )


def test_an_effect_beyond_all_controls_and_two_of_their_spreads_exceeds_them() -> None:
    assert told(5.0, *[1.0, 1.2] * 5) == (
        "The gain of 5 exceeds its controls: 10 other latents reach 1.2 at most (mean 1.1, standard deviation 0.105; the effect "
        "is 37 of them above the mean)."
    )
    assert told(5.0, 1.0, 1.2).endswith(" With so few controls it would come first by chance 1 time in 3.")


def test_an_effect_beyond_all_controls_by_little_does_not_exceed_them() -> None:
    found = AgainstControls(2.0, (0.0, 1.0, 1.9))
    assert not found.exceeds and found.reaching == 0
    assert "does not clearly exceed its controls: none of 3" in found.sentence("gain", "other latents")


def test_a_low_number_may_be_the_effect() -> None:
    low = AgainstControls(0.1, (0.9, 0.95, 1.0), higher=False)
    assert low.exceeds and low.spreads == pytest.approx(17.0) and low.best == 0.9
    assert low.sentence("share", "draws").startswith("The share of 0.1 falls below its controls: 3 draws reach 0.9 at least (")
    assert "is 17 of them below the mean" in low.sentence("share", "draws")
    assert not AgainstControls(0.1, (0.9, 0.95, 1.0)).exceeds
    assert "does not fall below its controls: 1 of 2 other latents reaches as little, down to 0.05" in told(
        0.1, 0.05, 1.0, higher=False
    )


@pytest.mark.parametrize("effect", [None, math.nan, math.inf])
def test_an_effect_that_is_no_number_is_compared_with_nothing(effect) -> None:
    found = AgainstControls(effect, (1.0, 2.0))
    assert (found.exceeds, found.spreads, found.reaching, found.undefined) == (False, None, 0, "the effect is not defined")
    assert "is not defined, so it cannot be compared" in told(effect, 1.0, 2.0)


def test_without_controls_or_with_a_single_one_nothing_is_claimed() -> None:
    none, one = AgainstControls(5.0, ()), AgainstControls(5.0, (1.0,))
    assert (none.exceeds, none.mean, none.spread, none.undefined) == (False, None, None, "there are no controls")
    assert (one.exceeds, one.mean, one.spread, one.undefined) == (False, 1.0, None, "a single control has no spread")
    assert told(5.0) == "The gain of 5 has no controls beside it: there are no controls (other latents)."
    assert "a single control beside it, which does not reach as much (1; other latents)" in told(5.0, 1.0)


def test_equal_controls_have_no_spread_to_count_in() -> None:
    above, same = AgainstControls(0.1, (0.0, 0.0, 0.0)), AgainstControls(0.3, (0.3,) * 7)
    assert above.spread == same.spread == 0 and above.spreads is None and above.undefined == "all controls are equal"
    assert above.exceeds and not same.exceeds
    assert "(mean 0; all of them are equal)" in told(0.1, 0.0, 0.0)
    assert told(0.3, 0.3, 0.3) == (
        "The gain of 0.3 does not exceed its controls: 2 of 2 other latents reach as much (mean 0.3; all of them are equal)."
    )


def test_controls_that_gave_no_number_are_left_out_and_counted() -> None:
    found = AgainstControls(5.0, (1.0, None, 2.0, math.nan))
    assert found.finite == (1.0, 2.0) and found.mean == 1.5
    assert "2 other latents (2 more gave no number)" in told(5.0, 1.0, None, 2.0, math.nan)
    assert AgainstControls(5.0, (None, math.nan)).undefined == "no control gave a number"
    assert told(5.0, None) == "The gain of 5 has no controls beside it: no control gave a number (other latents)."


# --- matched latents -----------------------------------------------------------------------------------------------


def activity(n: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Densities and sizes of n latents."""
    generator = torch.Generator().manual_seed(seed)
    return 10 ** -(3 * torch.rand(n, generator=generator)), 10 ** torch.randn(n, generator=generator)


def matched(chosen: list[int], density: torch.Tensor, size: torch.Tensor, seed: int = 0) -> list[int]:
    return matched_latents(chosen, density, size, torch.Generator().manual_seed(seed))


def test_matched_latents_are_others_and_all_different() -> None:
    chosen = list(range(0, 200, 2))
    drawn = matched(chosen, *activity())
    assert len(set(drawn)) == len(drawn) == 100
    assert not set(drawn) & set(chosen)


def test_matched_latents_are_far_more_like_the_chosen_than_any_others() -> None:
    density, size = activity()
    chosen = list(range(20))
    place = torch.stack([density.log(), size.log()], 1)
    near = (place[matched(chosen, density, size)] - place[chosen]).norm(dim=1).mean()
    anyone = (place[200:220] - place[chosen]).norm(dim=1).mean()
    assert near < 0.4 * anyone


def test_matched_latents_are_as_often_active() -> None:
    density = torch.tensor([0.9] * 30 + [0.03] * 30 + [0.0] * 4)
    for seed in range(5):
        drawn = matched([0, 1, 40], density, density, seed)
        assert not {0, 1, 40} & set(drawn) and len(set(drawn)) == 3
        assert drawn[0] < 30 and drawn[1] < 30 and 30 <= drawn[2] < 60


def test_the_seed_decides_which_latents_are_drawn() -> None:
    draws = [matched(list(range(20)), *activity(), seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_latents_that_are_not_active_are_never_drawn() -> None:
    assert matched([0, 1], torch.tensor([0.5, 0.5, 0.0, 0.4, 0.0]), torch.ones(5)) == [3]
