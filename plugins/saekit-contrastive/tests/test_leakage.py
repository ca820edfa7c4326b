from __future__ import annotations

import pytest
import torch
from saekit_contrastive.leakage import Leakage

from saekit import UsageError


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("above", [0.0, 0.05])
def test_it_is_the_sum_of_squared_correlations_of_the_other_latents(kit, sparse: bool, above: float) -> None:
    step = kit.step_of(sparse=sparse)
    batch = step.sequences
    dense = batch.code.dense()
    sequence = batch.mask.nonzero()[:, 0]
    expected = []
    for c in range(2):
        y = batch.labels[sequence, c]
        known = ~y.isnan()
        sums = 0.0
        for j in range(2, 64):  # latents 0 and 1 are the concepts' own
            pair = torch.stack([dense[known, j].detach(), y[known]])
            rho = torch.corrcoef(pair)[0, 1].nan_to_num(0.0)
            sums += max(0.0, float(rho) ** 2 - above)
        expected.append(sums)
    value = kit.prepared(Leakage(above=above), step.sae)(step)
    assert float(value.detach()) == pytest.approx(sum(expected) / 2, rel=1e-9)
    assert float(value.detach()) > 0
    gradient = torch.autograd.grad(value, step.sae.W_enc)[0]
    assert gradient[:, 2:].any() and not gradient[:, :2].any()


def test_shrinking_the_code_does_not_help(kit) -> None:
    step = kit.step_of()
    other = kit.step_of(kit.scaled(step.sae, 0.01))
    torch.testing.assert_close(*(kit.prepared(Leakage(), s.sae)(s) for s in (step, other)))


def test_one_class_says_nothing_and_a_wrong_latent_is_refused(kit) -> None:
    step = kit.step_of(sequences=torch.zeros(12, 2))
    assert not kit.prepared(Leakage(), step.sae).active(step)
    with pytest.raises(UsageError, match=r"^latents: "):
        kit.prepared(Leakage(latents={"code": 64}), step.sae)
