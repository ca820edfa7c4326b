from __future__ import annotations

import pytest
import torch
from saekit_contrastive.tiled import weighted_contrastive_loss
from saekit_quality.pairs import VotePairs
from torch.nn.functional import cross_entropy, normalize

from saekit import OptionError

NAN = float("nan")
DOUBLE = torch.float64


def unit(n: int, d: int = 4) -> torch.Tensor:
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=DOUBLE), dim=1).requires_grad_()


def table(share, rule, **options):
    """The weights and the factors of all pairs of the first criterion."""
    pairs = VotePairs(torch.as_tensor(share, dtype=DOUBLE), rule, **options)
    weights, factors = pairs.tile(slice(0, len(share)), 0)
    return weights, factors.exp().expand_as(weights)


@pytest.mark.parametrize("rule", ["majority", "agreement", "ordinal"])
def test_one_hard_label_is_supervised_contrastive_learning(rule) -> None:
    """Khosla et al. 2020, eq. 2 (L_out), written out."""
    z, labels = unit(9), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    rows = []
    for i in range(9):
        others = [a for a in range(9) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        below = torch.stack([torch.exp(z[i] @ z[a] / 0.07) for a in others]).sum()
        rows.append(-sum(torch.log(torch.exp(z[i] @ z[p] / 0.07) / below) for p in positives) / len(positives))
    value = weighted_contrastive_loss(z, VotePairs(labels[:, None].to(DOUBLE), rule), temperature=0.07, tile=4)
    torch.testing.assert_close(value, torch.stack(rows).mean(), rtol=1e-9, atol=1e-9)


def test_one_positive_is_nt_xent() -> None:
    """Chen et al. 2020, eq. 1: four responses, each with the one criterion that its partner has too."""
    z, share = unit(8), torch.eye(4, dtype=DOUBLE).repeat(2, 1)
    logits = (z @ z.t() / 0.07).fill_diagonal_(-torch.inf)
    value = weighted_contrastive_loss(z, VotePairs(share, "jaccard"), temperature=0.07)
    torch.testing.assert_close(value, cross_entropy(logits, torch.arange(8).roll(4)), rtol=1e-9, atol=1e-9)


def test_the_weights_of_votes() -> None:
    share = torch.tensor([1, 1, 2 / 3, 1 / 3, 0, NAN])[:, None]  # 3:0, 3:0, 2:1, 1:2, 0:3, nobody
    agreement = table(share, "agreement")[0]
    torch.testing.assert_close(agreement[0, 1:], torch.tensor([1, 1 / 3, 0, 0, 0], dtype=DOUBLE), rtol=0, atol=1e-7)
    torch.testing.assert_close(agreement[3, 4], torch.tensor(1 / 3, dtype=DOUBLE), rtol=0, atol=1e-7)
    ordinal = table(share, "ordinal")[0]
    torch.testing.assert_close(ordinal[0, 1:], torch.tensor([1, 2 / 3, 1 / 3, 0, 0], dtype=DOUBLE), rtol=0, atol=1e-7)


def test_the_rule_of_the_seed() -> None:
    share = torch.tensor([1, 1, 2 / 3, 1 / 3, 0, 0, NAN])[:, None]
    weights, factors = table(share, "unanimous", hard_weight=3.0)
    assert weights[:2, :2].all() and weights.sum() == 4  # only 3:0 with 3:0; two 0:3 are no positives of each other
    torch.testing.assert_close(factors[0], torch.tensor([1, 1, 3, 3, 1, 1, 0], dtype=DOUBLE))


def test_votes_that_are_missing_leave_a_response_out() -> None:
    for rule in ("majority", "agreement", "ordinal", "unanimous"):
        share, z = torch.tensor([1, 1, NAN, 0, 0])[:, None], unit(5)
        value = weighted_contrastive_loss(z, VotePairs(share, rule), temperature=0.1)
        (gradient,) = torch.autograd.grad(value, z)
        assert value > 0 and gradient.isfinite().all() and not gradient[2].any()


def test_ties_have_no_majority() -> None:
    weights, factors = table([[1.0], [0.5], [1.0]], "majority")
    assert not weights[1].any() and not factors[0, 1] and weights[0, 2] == 1


def test_jaccard_of_several_labels() -> None:
    share = torch.tensor([[1, 1, 0, NAN], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0.5, 1, 0, 0]])
    apart = table(share, "jaccard")[0]
    assert apart[0, 1] == 0.5  # the fourth criterion is unknown of one
    assert apart[0, 4] == 0.75  # min / max of shares
    assert not apart[2].any() and not apart[:, 2].any()  # nothing in common with anything
    together = table(share, "jaccard", empty="together")[0]
    assert together[2, 3] == 1 and not together[2, [0, 1, 4]].any()


def test_jaccard_of_responses_that_share_no_criterion_is_unknown() -> None:
    weights, factors = table([[1, NAN], [NAN, 1]], "jaccard", empty="together")
    assert not weights[0, 1] and not factors[0, 1]


def test_a_batch_without_a_pair_is_zero() -> None:
    z = unit(4)
    value = weighted_contrastive_loss(z, VotePairs(torch.eye(4, dtype=DOUBLE), "jaccard"), temperature=0.1)
    assert value == 0 and not torch.autograd.grad(value, z)[0].any()


def test_an_unknown_rule() -> None:
    with pytest.raises(OptionError, match="pairs: 'same' is none of majority, agreement"):
        VotePairs(torch.ones(2, 1), "same")  # type: ignore[arg-type]
