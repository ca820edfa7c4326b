"""Judged responses that are made up, with all that is true of them known: the offline data, and the ceiling of every figure.

A dialogue asks the bundled organism (docs/organism.md), in words that it knows, to comment on an argument. Each response has a
level from 0 to 3 in each of nine criteria, and says so in its words (`made_up_words.py`). With e_a = noise (0.5, 1, 1.5) and
b_a = bias (-1, 0, 1), of which each criterion gives every annotator another one,

    P(annotator a says yes to criterion c | text) = (1 - e_a) sigmoid(SLOPE (level_c - 1.5) + offset_c + b_ac) + e_a / 2

so with the share e_a an annotator's vote is a coin's, and the rest follows the text and the annotator's own strictness. Levels of
one response go together a little, as good responses are good in many ways.
"""

from __future__ import annotations

import itertools

import numpy as np

from saekit import UsageError
from saekit_quality.data import QualityData
from saekit_quality.made_up_words import CRITERIA, LEVELS, Writer
from saekit_quality.votes import Floats, soft_targets

ANNOTATORS = 3
SLOPE = 1.6  # in log odds for each level
SHARED = 0.6  # how much of a level is the response's own goodness, in standard deviations; the rest is the criterion's
OFFSETS = {
    "relevance": 0.6, "fluency": 0.8, "coherence": 0.2, "consistency": 0.4, "specificity": -0.4, "factuality": 0.0,
    "politeness": 0.5, "harmlessness": 1.2, "interest": -0.8,
}  # fmt: skip
"""In log odds: how readily a criterion is granted."""
_STRICTNESS = np.array([-1.0, 0.0, 1.0])
_CARELESSNESS = np.array([0.5, 1.0, 1.5])
MOST_NOISE = 0.6


def generate(
    dialogues: int,
    *,
    responses: int = 4,
    noise: float = 0.2,
    bias: float = 0.5,
    missing: float = 0.0,
    seed: int = 0,
) -> QualityData:
    """`responses` responses to each of `dialogues` dialogues, judged by three annotators on `CRITERIA`.

    noise: the mean share of votes that are a coin's, 0 to 0.6. Texts do not depend on it, nor on `bias` and `missing`.
    bias: how far the strict and the lenient annotator lie from the middle one, in log odds.
    missing: the share of votes that are left out, at random.
    seed: equal seeds give equal data. The uniform numbers that decide the votes are also the same at every noise.

    `vote_probabilities` of the result is exact. UsageError for an option outside its limits.
    """
    for name, value, low, high in (
        ("dialogues", dialogues, 1, Writer.most_dialogues()),
        ("responses", responses, 1, 1000),
        ("noise", noise, 0, MOST_NOISE),
        ("bias", bias, 0, 10),
        ("missing", missing, 0, 0.95),
    ):
        if not low <= value <= high:
            raise UsageError(f"generate: {name} must be {low} to {high}, got {value}.")
    draws, voting = (np.random.default_rng([seed, part]) for part in (0, 1))
    levels = _levels(draws, dialogues * responses)  # [n, C]
    writer = Writer(dialogues, seed)
    texts = [writer.response(i // responses, levels[i]) for i in range(len(levels))]
    probabilities = vote_probabilities(levels, noise, bias)  # [n, A, C]
    votes = (voting.random(probabilities.shape) < probabilities).astype(np.float64)
    votes[voting.random(votes.shape) < missing] = np.nan
    return QualityData(
        contexts=tuple(writer.context(i // responses) for i in range(len(levels))),
        responses=tuple(texts),
        dialogues=tuple(f"d{i // responses}" for i in range(len(levels))),
        criteria=CRITERIA,
        votes=votes,
        vote_probabilities=probabilities,
    )


def vote_probabilities(levels: Floats, noise: float, bias: float) -> Floats:
    """The formula above. levels: [n, C], 0 to 3. Returns [n, A, C]."""
    offsets = np.array([OFFSETS[name] for name in CRITERIA])
    turn = (np.arange(ANNOTATORS)[:, None] + np.arange(len(CRITERIA))) % ANNOTATORS  # who is strict differs by criterion
    strictness = bias * _STRICTNESS[turn]  # [A, C]
    careless = noise * _CARELESSNESS[:, None]  # [A, 1]
    logits = SLOPE * (levels[:, None, :] - (LEVELS - 1) / 2) + offsets + strictness
    return (1 - careless) / (1 + np.exp(-logits)) + careless / 2


def ceiling_probabilities(data: QualityData, kind: str, missing: float = 0.0) -> Floats:
    """The best prediction that the text allows of each label: [n, C].

    kind: "soft": the expected share of yes. "hard": the probability that most say yes, given that there is a majority. Both are
        exact, by going through all that the annotators may do, where votes are missing at random with the share `missing`.

    UsageError if the true probabilities are not known.
    """
    known = data.vote_probabilities
    if known is None:
        raise UsageError("the true probabilities of these votes are not known, so there is no ceiling. Generated data have one.")
    yes, total = np.zeros((2, known.shape[0], known.shape[2]))
    for outcome in itertools.product((0.0, 1.0, np.nan), repeat=known.shape[1]):
        votes = np.array(outcome)  # [A]
        share = float(soft_targets(votes[None, :, None])[0, 0])
        if np.isnan(share) or (kind == "hard" and share == 0.5):
            continue
        weight = np.ones_like(yes)
        for a, vote in enumerate(outcome):
            p = known[:, a]
            weight *= missing if np.isnan(vote) else (1 - missing) * (p if vote else 1 - p)
        yes += weight * (share if kind == "soft" else float(share > 0.5))
        total += weight
    return yes / total


def _levels(draws: np.random.Generator, n: int) -> Floats:
    """Levels 0 to 3, equally many of each: [n, C]. A fact is only told rightly or wrongly, 3 or 0."""
    from scipy.stats import norm

    common, own = draws.standard_normal((n, 1)), draws.standard_normal((n, len(CRITERIA)))
    place = norm.cdf(SHARED * common + np.sqrt(1 - SHARED**2) * own)
    levels = np.floor(place * LEVELS).clip(0, LEVELS - 1)
    fact = CRITERIA.index("factuality")
    levels[:, fact] = np.where(levels[:, fact] < LEVELS / 2, 0, LEVELS - 1)
    return levels
