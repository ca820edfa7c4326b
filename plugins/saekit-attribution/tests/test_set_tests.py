"""Which sets `atp` tests, on what, beside what, and what it says of them."""

from __future__ import annotations

import re

import pytest
import torch
from saekit_attribution.atp.sample_analysis import AnalysedSample
from saekit_attribution.atp.set_tests import SetTest, set_tests
from saekit_attribution.effects.batching import Failed
from saekit_attribution.effects.latent_sets import SetEffects
from saekit_attribution.effects.methods import Attribution
from saekit_attribution.labelled_data.teacher_forcing import Sample

D_SAE = 40
GAP = 5.0


def sample(question: int, scores: torch.Tensor, kind: str = "like") -> AnalysedSample:
    ones = torch.ones(D_SAE, dtype=torch.float64)
    one = Attribution(torch.arange(D_SAE), scores, ones, scores, ones, 0.0, 1.0, 1.0)
    return AnalysedSample(Sample((1, 2), 3, 4, (1, 3), (0, 1), (question, 1), kind), {"atp": one})


def linear(truth: dict[int, torch.Tensor], calls: list | None = None):
    """`set_effects` of a model in which latent j of question q adds truth[q][j]."""

    def run(samples: list[Sample], sets: list[list[int]]) -> list[SetEffects | Failed]:
        if calls is not None:
            calls.append(({s.place[0] for s in samples}, sets))
        found: list[SetEffects | Failed] = []
        for s in samples:
            values = [float(truth[s.place[0]][chosen].sum()) for chosen in sets]
            whole = float(truth[s.place[0]].sum())
            found.append(SetEffects(whole, values, values, GAP, [v / 2 for v in values], whole / 2))
        return found

    return run


def test_no_sample_is_tested_with_a_set_that_it_helped_to_choose() -> None:
    """Each question has a latent of its own beside the common one: what a set that was chosen on the same questions catches."""
    truth = {q: torch.zeros(D_SAE, dtype=torch.float64) for q in range(8)}
    for q, scores in truth.items():
        scores[0], scores[10 + q] = 1.0, 4.0
    calls: list = []
    tests, problems = set_tests(
        [sample(q, truth[q]) for q in truth], linear(truth, calls), [5], draws=2, d_sae=D_SAE, seed=0
    )
    (one, of_one), (other, of_other) = calls
    assert one | other == set(truth)
    assert not one & other
    for tested, sets in ((one, of_one), (other, of_other)):
        assert set(sets[0]) == {0} | {10 + q for q in truth if q not in tested}
        for control in sets[1:]:
            assert not set(control) & set(sets[0])
            assert len(control) == 5
    row = tests[0].row()
    assert (row["samples"], row["questions"], row["latents"]) == (8, 8, 5)
    assert row["necessity"] == pytest.approx(1 / 5) == pytest.approx(row["sufficiency"])
    assert row["put_in"] == pytest.approx(0.5 / GAP)
    assert row["put_in_all_latents"] == pytest.approx(2.5 / GAP)
    assert problems == []


def test_causes_exceed_their_controls_and_noise_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    causes = {q: torch.rand(D_SAE, generator=generator, dtype=torch.float64) * 0.01 for q in range(12)}
    for scores in causes.values():
        scores[:4] += 1.0
    noise = {q: torch.randn(D_SAE, generator=generator, dtype=torch.float64).abs() for q in range(12)}
    for truth, real in ((causes, True), (noise, False)):
        (test,), _ = set_tests([sample(q, truth[q]) for q in truth], linear(truth), [4], draws=8, d_sae=D_SAE, seed=0)
        row, said = test.row(), list(test.sentences())
        assert len(said) == 3
        if real:
            assert row["necessity"] > 0.9 > 0.05 > row["necessity_random_most"] >= row["necessity_random"]
            assert row["necessity_low"] <= row["necessity"] <= row["necessity_high"]
            assert all(exceeds and " exceeds its controls: " in text for text, exceeds in said)
            assert "of them above the mean" in said[0][0]
        else:
            assert abs(row["necessity"] - 4 / D_SAE) < 0.05
            assert all(re.search("not (clearly )?exceed its controls: ", text) for text, exceeds in said if not exceeds)
            assert not any(exceeds for _, exceeds in said)


def test_the_interval_is_over_questions_not_over_samples() -> None:
    """Ten samples of each of two questions are no more evidence than two."""
    test = SetTest("like", 1)
    for question, value in ((0, 0.2), (1, 0.8)):
        for _ in range(10):
            test.add(question, SetEffects(1.0, [value, 0.0], [value, 0.0], None, None, None), 0, [1])
    row = test.row()
    assert row["necessity"] == pytest.approx(0.5)
    assert (row["necessity_low"], row["necessity_high"]) == pytest.approx((0.2, 0.8))
    assert row["put_in"] is None
    assert row["put_in_low"] is None
    assert [text for text, _ in test.sentences() if "base run" in text] == []


def test_what_cannot_be_tested_is_said() -> None:
    scores = torch.zeros(D_SAE, dtype=torch.float64)
    scores[:2] = 1.0
    truth = dict.fromkeys(range(4), scores)
    tests, problems = set_tests([sample(0, scores)], linear(truth), [3], draws=2, d_sae=D_SAE, seed=0)
    assert tests == []
    assert "takes two questions" in problems[0]

    def fails(samples, sets):
        every = zip(samples, linear(truth)(samples, sets), strict=True)
        return [Failed("OOM", "no memory") if s.place[0] == 2 else found for s, found in every]

    (test,), problems = set_tests([sample(q, scores) for q in truth], fails, [3], draws=2, d_sae=D_SAE, seed=0)
    assert test.row()["samples"] == 3
    assert any("only 2 latents promote the target: 3 were asked for" in text for text in problems)
    assert any("1 samples of 'like' failed" in text for text in problems)


def test_no_effect_has_no_share() -> None:
    zero = {q: torch.zeros(D_SAE, dtype=torch.float64) for q in range(4)}
    (test,), _ = set_tests([sample(q, zero[q]) for q in zero], linear(zero), [3], draws=2, d_sae=D_SAE, seed=0)
    row = test.row()
    assert row["necessity"] is None
    assert row["sufficiency"] is None
    assert row["put_in"] == 0
