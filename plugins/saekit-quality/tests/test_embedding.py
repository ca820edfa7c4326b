"""Alignment and uniformity equal their definitions over pairs; the picture takes what it is given."""

import itertools

import numpy as np
import pytest
from saekit_quality import embedding
from saekit_quality.embedding import alignment, embedding_figure, uniformity

from saekit import UsageError


def planted(n=60, d=5, apart=2.0, seed=0):
    draws = np.random.default_rng(seed)
    labels = (draws.random(n) < 0.4).astype(float)
    z = draws.standard_normal((n, d))
    z[:, 0] += apart * (2 * labels - 1)
    return z, labels


def test_alignment_and_uniformity_equal_the_mean_over_pairs(monkeypatch):
    z, labels = planted()
    labels[5] = np.nan
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    pairs = [(i, j, ((unit[i] - unit[j]) ** 2).sum()) for i, j in itertools.combinations(range(60), 2)]
    found = alignment(z, labels)
    same = [square for i, j, square in pairs if labels[i] == labels[j]]
    assert found["same"] == pytest.approx(np.mean(same))
    assert found["yes"] == pytest.approx(np.mean([s for i, j, s in pairs if labels[i] == labels[j] == 1]))
    assert found["all"] == pytest.approx(np.mean([s for i, j, s in pairs if 5 not in (i, j)]))
    wanted = np.log(np.mean([np.exp(-2 * square) for _, _, square in pairs]))
    assert uniformity(z) == pytest.approx(wanted)
    monkeypatch.setattr(embedding, "_TILE", 7)
    assert uniformity(z) == pytest.approx(wanted)


def test_classes_that_lie_apart_are_better_aligned_than_all_pairs_and_a_point_is_least_uniform():
    apart, mixed = (alignment(*planted(400, apart=a)) for a in (3.0, 0.0))
    assert apart["same"] < 0.7 * apart["all"] and mixed["same"] == pytest.approx(mixed["all"], rel=0.02)
    assert uniformity(np.ones((10, 3))) == pytest.approx(0) and uniformity(planted()[0]) < -1
    assert alignment(np.ones((2, 3)), np.array([0.0, 1]))["same"] is None and uniformity(np.ones((1, 3))) is None


def test_the_picture_has_the_same_responses_before_and_after(monkeypatch):
    import plotly.graph_objects as go

    z, labels = planted(50)
    labels[0] = np.nan
    figure = embedding_figure({"before": planted(50, apart=0)[0], "after": z}, labels, "fluency")
    go.Figure(figure)
    before, after = figure["data"]
    assert len(before["x"]) == len(after["x"]) == 49 and before["marker"]["color"] == after["marker"]["color"]
    monkeypatch.setattr(embedding, "MOST_POINTS", 20)
    assert len(embedding_figure({"after": z}, labels, "fluency")["data"][0]["x"]) == 20
    with pytest.raises(UsageError, match="needs three"):
        embedding_figure({"after": z}, np.full(50, np.nan), "fluency")
