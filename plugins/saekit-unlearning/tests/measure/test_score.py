"""The score equals SAEBench's rule written out independently; every reason of a zero is provoked; the curve and intervals."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saekit_unlearning.curve import area, front
from saekit_unlearning.entity_intervals import intervals
from saekit_unlearning.measure import Outcome
from saekit_unlearning.score import (
    Setting,
    Tried,
    chosen_setting,
    held_back_reason,
    held_back_score,
    saebench_score,
    zero_reason,
)

SHARE = st.integers(0, 20).map(lambda n: n / 20)
SETTINGS = st.lists(
    st.builds(
        lambda f, a, b: Setting(f, {"near": (a, 20), "far": (b, 20)}), SHARE, st.integers(0, 20), st.integers(0, 20)
    ),
    max_size=6,
)


def literal(
    forget_right: np.ndarray, retain_right: np.ndarray, before: tuple[np.ndarray, np.ndarray], bound: float
) -> float:
    """SAEBench's score from the answers themselves: [settings, questions] each, and those before any edit.

    Metrics are shares of the questions right before; `all_side_effects_mcq` is their mean over all retain questions; the score is
    1 - min over settings with it at `bound` or more of the forget metric, and 0 without any."""
    scores = []
    for forget, retain in zip(forget_right, retain_right, strict=True):
        if retain[before[1]].mean() >= bound:
            scores.append(forget[before[0]].mean())
    return 1 - min(scores) if scores else 0.0


def test_saebench_score_equals_its_rule_on_random_tables() -> None:
    rng, zeros = np.random.default_rng(0), 0
    for _ in range(1000):
        settings, n, m, k = rng.integers(1, 8), rng.integers(5, 40), rng.integers(5, 60), rng.integers(5, 60)
        before = [rng.random(size) < 0.8 for size in (n, m, k)]
        for one in before:
            one[0] = True
        kept = rng.choice([0.9, 0.99, 1.0], size=settings)
        right = [
            rng.random((settings, size)) < (kept[:, None] if i else rng.random()) for i, size in enumerate((n, m, k))
        ]
        table = [
            Setting(
                float(right[0][s][before[0]].mean()),
                {g: (int(right[i][s][before[i]].sum()), int(before[i].sum())) for i, g in ((1, "near"), (2, "far"))},
            )
            for s in range(settings)
        ]
        bound = float(rng.choice([0.9, 0.99]))
        expected = literal(right[0], np.hstack(right[1:]), (before[0], np.hstack(before[1:])), bound)
        assert saebench_score(table, bound) == pytest.approx(expected, abs=1e-12)
        zeros += expected == 0
    assert 50 < zeros < 950  # both kinds were met


@given(SETTINGS)
def test_scores_are_shares_and_more_settings_never_lower_saebenchs(settings: list[Setting]) -> None:
    assert 0 <= saebench_score(settings) <= 1
    for n in range(len(settings)):
        assert saebench_score(settings[:n]) <= saebench_score(settings)
    chosen = chosen_setting(settings)
    if chosen is not None:
        own = settings[chosen]
        assert own.least_retained >= 0.99
        assert held_back_score(own) <= 1 - own.forget <= saebench_score(settings)
    else:
        assert all(one.least_retained < 0.99 for one in settings)


@given(SETTINGS)
def test_the_front_beats_all_and_the_area_is_the_mean_over_bounds(settings: list[Setting]) -> None:
    on = [settings[i] for i in front(settings)]
    for one in settings:
        assert any(o.forget <= one.forget and o.least_retained >= one.least_retained for o in on)
    bounds = (np.arange(200) + 0.5) / 200
    best = [max((1 - s.forget for s in settings if s.least_retained >= r), default=0.0) for r in bounds]
    assert area(settings) == pytest.approx(np.mean(best), abs=1e-9)  # shares are multiples of a twentieth
    assert area(on) == pytest.approx(area(settings))


def test_the_ends_of_the_area() -> None:
    one = [Setting(i / 1000, {"near": (i, 1000)}) for i in range(1001)]
    assert area([]) == area([Setting(1.0, {"near": (1, 1)})]) == 0
    assert area([Setting(0.0, {"near": (1, 1)})]) == 1
    assert area(one) == pytest.approx(0.5, abs=1e-3)  # what is forgotten is lost of the rest as well


# --- reasons ------------------------------------------------------------------------------------------------------------

NOTHING = Setting(1.0, {"near": (80, 80)})
BROKEN = Setting(0.3, {"near": (40, 80)})
ONE_LOST = Setting(0.5, {"near": (79, 80)})
GOOD = Setting(0.4, {"near": (80, 80)})


def tried(settings: list[Setting], **changes: object) -> Tried:
    values: dict[str, object] = {
        "candidates": 9,
        "settings": settings,
        "changed": 1.0,
        "right_before": 1.0,
        "chance": 0.25,
        "retain_questions": 80,
    }
    return Tried(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (tried([NOTHING], right_before=0.25), "at chance before any edit"),
        (tried([], candidates=0), "No latent was a candidate"),
        (tried([]), "No setting was tried"),
        (tried([NOTHING], changed=0.0), "changed nothing"),
        (
            tried([BROKEN], unedited=Setting(0.95, {"near": (70, 80)})),
            "The reconstruction alone, before any edit, keeps 0.88",
        ),
        (tried([NOTHING, ONE_LOST]), "finer than one of 80 questions"),
        (tried([NOTHING, BROKEN]), r"down to 0\.30.* kept less than 0\.99 .*0\.50 at best"),
        (tried([NOTHING], spliced=0.4), "error, which is kept, puts the knowledge back.* 0.40"),
        (tried([NOTHING]), "No edit moved the accuracy"),
    ],
)
def test_a_zero_has_its_reason(one: Tried, words: str) -> None:
    reason = zero_reason(one)
    assert reason is not None and re.search(words, reason)


def test_what_is_not_zero_has_none() -> None:
    assert zero_reason(tried([GOOD, NOTHING])) is None
    assert held_back_reason([GOOD], 0, GOOD) is None


@pytest.mark.parametrize(
    ("seen", "chosen", "unseen", "words"),
    [
        ([NOTHING], None, None, "No setting made the model forget"),
        (
            [BROKEN, Setting(0.5, {"near": (80, 80), "far": (78, 80)})],
            None,
            None,
            "kept 0.97 of the group that suffers most",
        ),
        ([GOOD], 0, NOTHING, r"down to 0\.40\), and nothing in others"),
        ([GOOD], 0, Setting(0.4, {"near": (0, 80)}), "nothing is left of a group"),
    ],
)
def test_our_zero_has_its_reason(seen: list[Setting], chosen: int | None, unseen: Setting | None, words: str) -> None:
    reason = held_back_reason(seen, chosen, unseen)
    assert reason is not None and re.search(words, reason)


# --- intervals ----------------------------------------------------------------------------------------------------------


def outcome(forget: np.ndarray, near: np.ndarray, each: int = 1) -> Outcome:
    """Of entities with `each` questions of which all or none are right."""
    asked = {"forget": np.full(len(forget), each), "near": np.full(len(near), each)}
    return Outcome({"forget": forget * each, "near": near * each}, asked, 1.0)


def test_questions_about_one_entity_count_as_one() -> None:
    """Asking each entity ten times in place of once, with the same answers, does not narrow the interval."""
    rng = np.random.default_rng(0)
    forget, near = (rng.random(40) < 0.4).astype(float), (rng.random(40) < 0.9).astype(float)
    once, ten = (intervals(outcome(forget, near, each), 0) for each in (1, 10))
    assert once[0] == ten[0] and once[1] == ten[1]
    low, high = once[0]["forget"]
    assert low < forget.mean() < high and high - low > 0.2


def test_a_group_that_is_all_right_has_an_interval() -> None:
    shares, score = intervals(outcome(np.zeros(40), np.ones(40)), 0)
    assert shares["near"].low == pytest.approx(0.912, abs=1e-3) and shares["near"].high == 1
    assert score.low == pytest.approx(0.912**2, abs=2e-3) and score.high == 1


def test_the_interval_covers_the_true_share() -> None:
    """Of 100 draws of 40 entities with two questions that agree, about 95 percent have the true share in their interval."""
    rng, covered = np.random.default_rng(1), 0
    for number in range(100):
        low, high = intervals(outcome((rng.random(40) < 0.6).astype(float), np.ones(3), 2), number)[0]["forget"]
        covered += low <= 0.6 <= high
    assert 0.88 <= covered / 100 <= 0.99
