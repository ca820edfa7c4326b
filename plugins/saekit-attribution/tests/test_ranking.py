"""Rankings over a data set, and the weights that leave out what the base prompt has too."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from saekit_attribution.effects.attribute import attribute
from saekit_attribution.effects.methods import Attribution
from saekit_attribution.effects.ranking import agreement, by_weight, ranked

from saekit.activations.subject import Subject


def attribution(scores: dict[int, float]) -> Attribution:
    values = torch.tensor(list(scores.values()), dtype=torch.float64)
    latents = torch.tensor(sorted(scores))
    return Attribution(latents, values, values.abs(), None, values.abs(), 0.0, 1.0, 1.0)


def test_a_latent_that_is_absent_counts_as_zero() -> None:
    ranking = ranked([attribution({2: 4.0, 5: 1.0, 9: -1.0}), attribution({5: 1.0})])
    assert ranking.latents.tolist() == [2, 5, 9]
    assert ranking.scores.tolist() == [2.0, 1.0, -0.5]
    assert ranking.spread.tolist() == [2.0, 0.0, 0.5]
    assert ranking.share.tolist() == [0.5, 1.0, 0.5]
    assert ranking.activations.tolist() == [2.0, 1.0, 0.5]


def test_only_latents_that_promote_the_target_are_taken() -> None:
    assert ranked([attribution({1: -5.0, 3: 2.0, 4: 3.0, 6: 0.0})]).top(4) == [4, 3]


def test_nothing_cannot_be_ranked() -> None:
    with pytest.raises(ValueError, match="nothing to rank"):
        ranked([])


def test_agreement_is_of_ranks_over_the_latents_of_either() -> None:
    one = ranked([attribution({1: 1.0, 2: 2.0, 3: 300.0})])
    assert agreement(one, ranked([attribution({1: 0.1, 2: 5.0, 3: 6.0})])) == pytest.approx(1.0)
    assert agreement(one, ranked([attribution({1: -1.0, 2: -2.0, 3: -3.0})])) == pytest.approx(-1.0)
    # latent 7 is at zero in the first: ranks (1, 2, 3, 0) against (0, 1, 2, 3)
    other = ranked([attribution({1: 0.0, 2: 1.0, 3: 2.0, 7: 3.0})])
    assert agreement(one, other) == pytest.approx(-0.2)


def test_without_an_aligned_position_the_weighted_scores_are_those_of_atp(tiny, gpt2: Subject) -> None:
    sae = tiny.sae(gpt2)
    samples = [dataclasses.replace(s, aligned=(-1,) * len(s.tokens)) for s in tiny.samples([9, 12, 9])]
    for outcome in attribute(gpt2, sae, samples, positions="all"):
        torch.testing.assert_close(by_weight(outcome["atp"]).scores, outcome["atp"].scores, atol=1e-10, rtol=0)


def test_what_the_base_prompt_has_as_well_weighs_nothing(tiny, gpt2: Subject) -> None:
    """Up to the inserted text both prompts are the same, so latents that are active only there score zero."""
    sae = tiny.sae(gpt2)
    samples = tiny.samples([14, 11])
    for sample, outcome in zip(samples, attribute(gpt2, sae, samples, positions="all"), strict=True):
        shared = dataclasses.replace(sample, aligned=tuple(range(len(sample.tokens))), base_tokens=sample.tokens)
        (same,) = attribute(gpt2, sae, [shared], positions="all")
        assert same["atp"].weighted.abs().max() == 0
        assert 0 < outcome["atp"].weighted.count_nonzero() < len(outcome["atp"].weighted)


def test_exact_effects_have_no_weighted_scores() -> None:
    with pytest.raises(ValueError, match="nothing to weight"):
        by_weight(dataclasses.replace(attribution({1: 1.0}), weighted=None))
