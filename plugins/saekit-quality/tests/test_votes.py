"""Targets, agreement and weights follow from votes as their definitions say."""

import numpy as np
import pytest
from saekit_quality.votes import (
    agreement,
    constant,
    hard_targets,
    pos_weight,
    sampling_weights,
    soft_targets,
    unanimous,
)

from saekit import UsageError

NONE = np.nan


def votes(*rows):
    """[n, 3, 1] from one row of three votes for each response."""
    return np.array(rows, dtype=float)[:, :, None]


def test_targets_are_the_share_and_the_majority_of_the_votes_that_there_are():
    given = votes((1, 1, 1), (1, 1, 0), (0, 0, 1), (1, 0, NONE), (NONE, NONE, NONE), (NONE, NONE, 0))
    np.testing.assert_allclose(soft_targets(given)[:, 0], [1, 2 / 3, 1 / 3, 0.5, NONE, 0])
    np.testing.assert_array_equal(hard_targets(given)[:, 0], [1, 1, 0, NONE, NONE, 0])
    np.testing.assert_allclose(agreement(given)[:, 0], [1, 1 / 3, 1 / 3, 0, NONE, 1])
    assert unanimous(given)[:, 0].tolist() == [True, False, False, False, False, False]


def test_one_annotator_has_targets_and_no_agreement():
    one = np.array([[[1.0]], [[0.0]]])
    assert hard_targets(one)[:, 0].tolist() == soft_targets(one)[:, 0].tolist() == [1, 0]
    with pytest.raises(UsageError, match="one annotator only"):
        agreement(one)
    with pytest.raises(UsageError, match="one annotator only"):
        unanimous(one)


def test_constant_criteria_are_named_with_the_reason():
    targets = np.array([[1.0, 0, NONE, 1], [1, 1, NONE, NONE]])
    assert constant(targets, ["fluency", "interest", "relevance", "clarity"]) == {
        "fluency": "all 2 responses have the label 1",
        "relevance": "no response has a label",
        "clarity": "all 1 responses have the label 1",
    }


def test_pos_weight_gives_yes_and_no_the_same_total():
    targets = np.array([[1.0, 1], [0, 1], [0, NONE], [0, 1], [0.5, 1]])
    weight = pos_weight(targets)
    assert weight[0] * np.nansum(targets[:, 0]) == pytest.approx(np.nansum(1 - targets[:, 0]))
    assert weight[1] == 1  # a criterion without a no


def test_sampling_weights_balance_one_criterion_exactly_and_leave_out_what_says_nothing():
    draws = np.random.default_rng(0)
    targets = np.stack([(draws.random(200) < 0.1).astype(float), np.ones(200), np.full(200, NONE)], 1)
    weights = sampling_weights(targets)
    assert weights.mean() == pytest.approx(1)
    assert weights[targets[:, 0] == 1].sum() == pytest.approx(weights[targets[:, 0] == 0].sum())
    two = np.stack([targets[:, 0], (draws.random(200) < 0.2).astype(float)], 1)
    shares = (sampling_weights(two)[:, None] * two).sum(0) / 200
    assert (shares > two.mean(0)).all() and (shares < 0.75).all()
    assert sampling_weights(targets[:, 1:]).tolist() == [1] * 200
