"""A planted temperature is found again, and only calibration changes; reliability follows its definition."""

import numpy as np
import pytest
from saekit_quality.calibration import fit_temperatures, reliability, reliability_figure, sigmoid
from saekit_quality.metrics import measure


def planted(temperatures, n=6000, seed=0):
    """Logits that are too large or too small by a factor for each criterion, and labels of the true ones."""
    draws = np.random.default_rng(seed)
    true = 1.5 * draws.standard_normal((n, len(temperatures)))
    return true * np.array(temperatures), (draws.random(true.shape) < sigmoid(true)).astype(float)


def test_planted_temperatures_are_found_on_one_half_and_calibrate_the_other():
    logits, labels = planted([3.0, 0.5])
    names, dialogues = ["a", "b"], [str(i) for i in range(3000)]
    found = fit_temperatures(logits[:3000], labels[:3000], names)
    np.testing.assert_allclose(found.values, [3.0, 0.5], rtol=0.1)
    assert not found.notes
    before = measure(sigmoid(logits[3000:]), labels[3000:], dialogues, names, resamples=0)
    after = measure(found.probabilities(logits[3000:]), labels[3000:], dialogues, names, resamples=0)
    assert after.macro["ece"].value < 0.4 * before.macro["ece"].value
    assert after.macro["auroc"].value == pytest.approx(before.macro["auroc"].value, abs=1e-12)
    one = fit_temperatures(logits, labels, names, one=True).values
    assert one[0] == one[1] and 0.5 < one[0] < 3


def test_what_cannot_be_fitted_keeps_its_logits_and_says_why():
    logits, labels = planted([1.0, 1.0])
    labels[:, 0] = 1
    labels[::2, 1] = np.nan
    found = fit_temperatures(logits, labels, ["a", "b"])
    assert found.values[0] == 1 and found.notes == {"a": "not fitted: all 6000 responses have the label 1"}
    assert found.values[1] == pytest.approx(1, rel=0.15)
    backwards = fit_temperatures(-logits[:, 1:], labels[:, 1:], ["b"])
    assert backwards.values[0] > 19 and "end of its range" in backwards.notes["b"]


def test_reliability_counts_each_bin_and_its_figure_names_the_ece():
    probabilities = np.array([0.01, 0.02, 0.99, 0.99, 0.99, 0.5])
    labels = np.array([0.0, 1, 1, 1, 0, np.nan])
    rows = reliability(probabilities, labels)
    assert [row["n"] for row in rows] == [2, 3]
    assert rows[0]["share"] == 0.5 and rows[1]["share"] == pytest.approx(2 / 3) and rows[1]["probability"] == pytest.approx(0.99)
    assert all(row["low"] <= row["share"] <= row["high"] for row in rows)
    figure = reliability_figure({"plain": probabilities[:, None]}, labels[:, None])
    import plotly.graph_objects as go

    go.Figure(figure)  # is a figure that plotly takes
    ece = (2 * abs(0.015 - 0.5) + 3 * abs(0.99 - 2 / 3)) / 5
    assert figure["data"][1]["name"] == f"plain (ECE {ece:.3f})"
