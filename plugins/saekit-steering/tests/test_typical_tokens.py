"""Typical tokens: planted ones are found, rare ones are not, and the log-odds follows its definition."""

from __future__ import annotations

import pytest
import torch
from saekit_steering.cluster import sign_agreement
from saekit_steering.typical_tokens import concept_column, typical_tokens

from saekit import RunContext, UsageError


def planted(seed: int = 0) -> torch.Tensor:
    """Texts of 20,000 tokens each: tokens 0 to 4 are five times as frequent with the concept, 5 to 9 without it."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.ones(2, 200)
    shares[1, :5] = shares[0, 5:10] = 5.0
    return torch.stack(
        [torch.bincount(torch.multinomial(p, 20_000, True, generator=generator), minlength=200) for p in shares]
    )


def test_planted_tokens_are_found() -> None:
    found = typical_tokens(planted(), size=5, min_count=20)
    assert set(found.positive) == set(range(5))
    assert set(found.negative) == set(range(5, 10))
    assert float(found.ratio[0]) == pytest.approx(1.6, abs=0.25)  # log 5


def test_a_rare_token_of_one_class_alone_is_not_typical() -> None:
    counts = planted()
    counts[:, 50] = torch.tensor([0, 19])  # a ratio of its own, and hardly seen
    assert 50 not in typical_tokens(counts, size=50, min_count=20).positive
    assert 50 in typical_tokens(counts, size=50, min_count=19).positive


def test_a_set_holds_only_tokens_of_its_own_side() -> None:
    found = typical_tokens(planted(), size=1000, min_count=1)
    assert not set(found.positive) & set(found.negative)
    assert (found.ratio[found.positive] > 0).all()
    assert (found.ratio[found.negative] < 0).all()


def test_equal_texts_have_no_typical_tokens() -> None:
    with pytest.raises(UsageError, match="no token is typical"):
        typical_tokens(torch.ones(2, 10, dtype=torch.int64) * 100, 5, 1)


def test_log_odds_of_the_next_token() -> None:
    found = typical_tokens(torch.tensor([[90, 90, 5, 5], [5, 5, 90, 90]]), 2, 1)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert float(found.log_odds(p.log())) == pytest.approx(float((p[2:].sum() / p[:2].sum()).log()))
    assert found.share([0, 2, 3]) == pytest.approx(2 / 3)
    assert typical_tokens(planted(), 5, 20).share([100]) is None


def test_an_unknown_concept_names_those_that_there_are(context: RunContext) -> None:
    assert concept_column(context, "short") == 1
    with pytest.raises(UsageError, match="Its labels: even, short"):
        concept_column(context, "code")


def test_the_right_sign_is_that_of_the_concept_and_zero_is_never_right() -> None:
    expected = torch.tensor([1.0, -1.0, 1.0, 0.0])
    change = torch.tensor([0.5, -0.5, 0.0, 0.0])
    assert sign_agreement(change, expected, forward=True) == 0.5
    assert sign_agreement(-change, expected, forward=False) == 0.5
