"""Damage at equal effect, and whether an effect rises with every strength."""

from __future__ import annotations

import pytest
from saekit_steering.effect_curve import EffectCurve


def test_the_damage_is_interpolated_where_the_effect_is_first_reached() -> None:
    curve = EffectCurve([1.0, 2.0, 4.0], [1.0, 3.0, 2.0], [0.1, 0.5, 9.0])
    assert curve.damage_at(2.0) == pytest.approx((1.5, 0.3))
    assert curve.damage_at(0.5) == pytest.approx((0.5, 0.05))
    assert curve.damage_at(3.1) is None


def test_a_falling_direction_never_reaches_a_gain() -> None:
    assert EffectCurve([1.0, 2.0], [-1.0, -5.0], [0.1, 0.2]).damage_at(0.5) is None


def test_a_sweep_of_negative_strengths_is_followed_downwards() -> None:
    curve = EffectCurve([-2.0, -1.0], [-3.0, -1.0], [0.4, 0.2])
    assert curve.damage_at(2.0) == pytest.approx((1.5, 0.3))
    assert curve.largest == 3.0
    assert curve.monotone


def test_monotone_means_at_every_strength_and_from_zero_on() -> None:
    assert EffectCurve([1.0, 2.0], [0.1, 0.2], [0.0, 0.0]).monotone
    assert not EffectCurve([1.0, 2.0], [-0.1, 0.2], [0.0, 0.0]).monotone
    assert not EffectCurve([1.0, 2.0, 3.0], [0.1, 0.3, 0.2], [0.0] * 3).monotone
    assert not EffectCurve([1.0, 2.0], [0.1, 0.1], [0.0, 0.0]).monotone
