"""Metrics equal scikit-learn's and torchmetrics', under weights too; intervals widen with clusters; what is constant is named."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saekit_quality import weighted
from saekit_quality.metrics import macro_auroc, measure, share_of_ceiling
from sklearn import metrics as sk
from torchmetrics.functional.classification import binary_calibration_error

from saekit import UsageError


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 60), steps=st.sampled_from([3, 10, 10**6]))
def test_weighted_metrics_equal_scikit_learn(seed, n, steps):
    draws = np.random.default_rng(seed)
    scores = np.round(draws.random(n) * steps) / steps  # with many ties, or none
    labels = (draws.random(n) < 0.5).astype(float)
    weights = draws.integers(0, 3, (4, n)).astype(float)
    ours = [metric(scores, labels, weights) for metric in (weighted.auroc, weighted.average_precision, weighted.f1)]
    for w, *found in zip(weights, *ours, strict=True):
        if not (w * labels).sum() or not (w * (1 - labels)).sum():
            assert np.isnan(found).all()
            continue
        wanted = [
            sk.roc_auc_score(labels, scores, sample_weight=w),
            sk.average_precision_score(labels, scores, sample_weight=w),
            sk.f1_score(labels, scores >= 0.5, sample_weight=w, zero_division=0),
        ]
        np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_ece_equals_torchmetrics_and_weights_are_repetitions():
    draws = np.random.default_rng(0)
    scores, labels = draws.random(500), (draws.random(500) < 0.3).astype(float)
    found = float(weighted.ece(scores, labels, np.ones((1, 500)))[0])
    # torchmetrics takes the confidence of the class that is predicted; above one half that is the probability of yes.
    high = scores > 0.5
    wanted = binary_calibration_error(torch.tensor(scores[high]), torch.tensor(labels[high]).long(), n_bins=15)
    assert float(weighted.ece(scores[high], labels[high], np.ones((1, high.sum())))[0]) == pytest.approx(float(wanted), abs=1e-6)
    counts = draws.integers(0, 3, 500)
    again = float(weighted.ece(np.repeat(scores, counts), np.repeat(labels, counts), np.ones((1, counts.sum())))[0])
    assert float(weighted.ece(scores, labels, counts[None].astype(float))[0]) == pytest.approx(again)
    assert 0.1 < found < 0.5


def planted(seed, dialogues=60, each=5, clustered=True):
    """Scores that share an error within a dialogue, if `clustered`."""
    draws = np.random.default_rng(seed)
    group = np.repeat(np.arange(dialogues), each)
    noise = draws.standard_normal(dialogues)[group] if clustered else draws.standard_normal(len(group))
    labels = (draws.random(dialogues)[group] < 0.5).astype(float) if clustered else (draws.random(len(group)) < 0.5).astype(float)
    return 1 / (1 + np.exp(-(labels - 0.5 + noise)))[:, None], labels[:, None], [f"d{g}" for g in group]


def test_intervals_go_by_dialogue_and_cover_the_truth():
    """AUROC of N(0.5, 1) against N(-0.5, 1) is Phi(1 / sqrt 2) = 0.760."""
    covered, wide, narrow = 0, [], []
    for seed in range(40):
        p, labels, dialogues = planted(seed)
        low, high = measure(p, labels, dialogues, ["a"], resamples=200, seed=seed).macro["auroc"].interval
        covered += low <= 0.760 <= high
        wide.append(high - low)
        one = measure(p, labels, [str(i) for i in range(len(p))], ["a"], resamples=200, seed=seed).macro["auroc"].interval
        narrow.append(one[1] - one[0])
    assert covered >= 34  # of 40; 38 are expected
    assert np.mean(wide) > 1.7 * np.mean(narrow)  # sqrt(5) = 2.2, were the rows of a dialogue quite equal


def test_a_constant_criterion_is_named_and_left_out_of_the_mean():
    p, labels, dialogues = planted(0, clustered=False)
    two = np.concatenate([labels, np.ones_like(labels)], 1)
    found = measure(np.concatenate([p, p], 1), two, dialogues, ["fluency", "relevance"], resamples=20)
    assert found.reasons == {"relevance": "all 300 responses have the label 1"}
    assert all(e.value is None and e.note for e in found.criteria["relevance"].values())
    assert found.macro["auroc"].value == found.criteria["fluency"]["auroc"].value
    assert found.macro["auroc"].value == pytest.approx(sk.roc_auc_score(labels[:, 0], p[:, 0]))
    told = found.as_json()
    assert told["not_defined"] == found.reasons and told["criteria"]["relevance"]["f1"]["value"] is None
    nothing = measure(p, np.ones_like(labels), dialogues, ["a"])
    assert nothing.macro["auroc"].value is None and macro_auroc(p, np.ones_like(labels)) is None


def test_missing_labels_are_left_out_and_few_dialogues_are_told():
    p, labels, dialogues = planted(1, clustered=False)
    labels[::2] = np.nan
    found = measure(p, labels, dialogues, ["a"], resamples=0)
    assert found.criteria["a"]["auroc"].n["responses"] == 150
    assert found.criteria["a"]["average_precision"].value == pytest.approx(sk.average_precision_score(labels[1::2, 0], p[1::2, 0]))
    assert found.criteria["a"]["f1"].interval is None and not found.macro["f1"].note
    assert "fewer than 10 dialogues" in measure(p[:30], labels[:30], dialogues[:30], ["a"], resamples=10).macro["f1"].note


def test_wrong_input_is_refused():
    p, labels, dialogues = planted(0)
    with pytest.raises(UsageError, match="0 to 1"):
        measure(p * 3, labels, dialogues, ["a"])
    with pytest.raises(UsageError, match="hard_targets"):
        measure(p, labels * 0.5, dialogues, ["a"])
    with pytest.raises(UsageError, match="300 responses and 2 criteria"):
        measure(p, labels, dialogues, ["a", "b"])


def test_the_share_of_the_ceiling_is_of_its_lead_over_chance():
    assert share_of_ceiling(0.7, 0.9) == pytest.approx(0.5)
    assert share_of_ceiling(0.7, 0.5) is None and share_of_ceiling(None, 0.9) is None
