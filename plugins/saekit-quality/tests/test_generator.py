"""Made-up responses: equal for equal seeds, they fit the organism, and their true probabilities are the ceiling."""

import itertools

import numpy as np
import pytest
from saekit_quality.generator import ceiling_probabilities, generate, vote_probabilities
from saekit_quality.made_up_words import CRITERIA
from saekit_quality.metrics import macro_auroc
from saekit_quality.tokens import tokenise
from saekit_quality.votes import hard_targets, soft_targets

from saekit import UsageError, organism


@pytest.fixture(scope="module")
def made():
    return generate(400, noise=0.2, missing=0.1, seed=3)


def test_equal_seeds_are_equal_and_texts_do_not_depend_on_noise(made):
    again, noisier, other = generate(400, noise=0.2, missing=0.1, seed=3), generate(400, noise=0.5, seed=3), generate(400, seed=4)
    assert again.responses == made.responses and again.contexts == made.contexts
    np.testing.assert_array_equal(again.votes, made.votes)
    assert noisier.responses == made.responses
    assert not np.array_equal(np.nan_to_num(noisier.votes), np.nan_to_num(made.votes))
    assert other.responses != made.responses
    assert len(set(made.dialogues)) == len(set(made.contexts)) == 400


def test_texts_fit_the_organism_and_hold_no_word_it_lacks(made):
    from transformers import AutoTokenizer

    rows = tokenise(made.contexts, made.responses, AutoTokenizer.from_pretrained(organism.directory()), 128)
    assert (rows.contexts_cut, rows.responses_cut) == (0, 0)


def test_votes_come_as_often_as_their_probabilities_say(made):
    known = ~np.isnan(made.votes)
    assert known.mean() == pytest.approx(0.9, abs=0.01)
    off = np.where(known, made.votes - made.vote_probabilities, 0).sum(0) / known.sum(0)  # [A, C]
    assert np.abs(off).max() < 4.5 * 0.5 / np.sqrt(known.sum(0).min())


def test_noise_one_half_of_the_votes_pulls_probabilities_to_one_half():
    levels = np.full((1, 9), 3.0)
    still, noisy = vote_probabilities(levels, 0.0, 0.0), vote_probabilities(levels, 0.6, 0.0)
    careless = np.array([0.3, 0.6, 0.9])[None, :, None]
    np.testing.assert_allclose(noisy, (1 - careless) * still + careless / 2)
    biased = vote_probabilities(levels, 0.0, 1.0)
    assert (np.sort(biased, axis=1)[:, 0] < still[:, 0]).all() and (np.sort(biased, axis=1)[:, 2] > still[:, 0]).all()


def test_the_ceiling_is_the_chance_of_a_majority():
    data = generate(2, seed=0)
    p = data.vote_probabilities
    whole = sum(
        np.prod([p[:, a] if vote else 1 - p[:, a] for a, vote in enumerate(votes)], axis=0)
        for votes in itertools.product((0, 1), repeat=3)
        if sum(votes) > 1
    )
    np.testing.assert_allclose(ceiling_probabilities(data, "hard"), whole, atol=1e-12)
    np.testing.assert_allclose(ceiling_probabilities(data, "soft"), p.mean(1), atol=1e-12)


def test_the_ceiling_with_missing_votes_agrees_with_the_labels_and_is_beaten_by_nothing_that_knows_the_text(made):
    labels = hard_targets(made.votes)
    best = ceiling_probabilities(made, "hard", missing=0.1)
    known = ~np.isnan(labels)
    off = np.where(known, labels - best, 0).sum(0) / known.sum(0)
    assert np.abs(off).max() < 4.5 * 0.5 / np.sqrt(known.sum(0).min())
    top = macro_auroc(best, labels)
    assert 0.8 < top < 0.95
    draws = np.random.default_rng(0)
    assert macro_auroc(np.clip(best + 0.3 * draws.standard_normal(best.shape), 0, 1), labels) < top - 0.02
    assert macro_auroc(soft_targets(np.nan_to_num(made.votes)), labels) > top  # votes know more than texts do


def test_levels_can_be_told_from_words(made):
    """Politeness and fluency, as two examples, by counting: the votes follow what is written."""
    rows = [text.split(" ") for text in made.responses]
    stutters = np.array([sum(a == b for a, b in itertools.pairwise(words)) for words in rows])
    rude = np.array([text.startswith(("Nonsense", "Awful", "Stay", "Nonsense Nonsense")) for text in made.responses])
    p = made.vote_probabilities.mean(1)
    assert np.corrcoef(stutters, p[:, CRITERIA.index("fluency")])[0, 1] < -0.9
    politeness = p[:, CRITERIA.index("politeness")]
    assert politeness[rude].max() < politeness[~rude].min() + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.7}, "noise must be 0 to 0.6"),
        ({"missing": 1.0}, "missing"),
        ({"bias": -1}, "bias"),
        ({"responses": 0}, "responses"),
    ],
)
def test_options_outside_their_limits_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        generate(3, **options)
    with pytest.raises(UsageError, match="dialogues must be 1"):
        generate(0)


def test_without_true_probabilities_there_is_no_ceiling():
    from dataclasses import replace

    with pytest.raises(UsageError, match="no ceiling"):
        ceiling_probabilities(replace(generate(1), vote_probabilities=None), "hard")
