"""Relearning half of what was forgotten, through edits that stay, and what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from saekit_unlearning.answers import Examination
from saekit_unlearning.baselines.material import Material
from saekit_unlearning.data import FORGET, UnlearningData
from saekit_unlearning.edited import Edited, copied
from saekit_unlearning.edits import Ablate, LatentEdit
from saekit_unlearning.relearning import Relearned, extra_gain, halves, relearn, share_above, verdict

from saekit import Registry
from saekit.testing.fixtures import build_sae


@pytest.fixture
def edit(material: Material) -> LatentEdit:
    passages = next(material.site.passages([row.tokens for row in material.forget]))
    d = material.site.subject.width()
    sae = build_sae(Registry().find("architecture", "topk"), {}, passages.x.float(), d_in=d, d_sae=48).double()
    active = sae.encode(passages.x).fired().argsort(descending=True)[:5]
    return LatentEdit(sae, active, Ablate(), "spliced")


@pytest.fixture
def passages(material: Material) -> Any:
    return next(material.site.passages([row.tokens for row in material.forget[:6]]))


def test_the_halves_share_no_entity_and_are_all_of_them(facts: UnlearningData) -> None:
    for seed in range(5):
        learned, others = halves(facts, seed)
        assert not learned & others
        assert learned | others == {text.entity for text in facts.forget}
        assert len(learned) == len(others)
    assert len({halves(facts, seed) for seed in range(9)}) > 1


@pytest.mark.parametrize("path", ["spliced", "error_kept"])
def test_a_whole_forward_and_one_from_the_site_agree(
    material: Material, edit: LatentEdit, passages: Any, path: Any
) -> None:
    own = LatentEdit(edit.sae, edit.latents, edit.operation, path)
    one = Edited("", material.site, edit=own)
    expected = material.site.logits(passages, own)
    assert not torch.allclose(expected[passages.mask], material.site.logits(passages)[passages.mask])
    for found in (one.logits(passages), one.whole(passages.tokens, passages.mask), one.copied().logits(passages)):
        torch.testing.assert_close(found[passages.mask], expected[passages.mask], rtol=1e-9, atol=1e-9)


def test_gradients_reach_the_layers_below_through_an_edit_that_stays(
    material: Material, edit: LatentEdit, passages: Any
) -> None:
    site = copied(material.site)
    sae, weight = edit.sae, site.subject.model.transformer.h[0].mlp.c_fc.weight.requires_grad_(True)  # type: ignore[union-attr]

    def loss(of: Any) -> torch.Tensor:
        return Edited("", site, True, of).whole(passages.tokens, passages.mask)[passages.mask].square().mean()

    (found,) = torch.autograd.grad(loss(edit), weight)
    assert found.abs().max() > 0
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    with torch.no_grad():
        step, sides = 1e-6, []
        for sign in (1, -1):
            weight += sign * step * direction
            sides.append(float(loss(edit)))
            weight -= sign * step * direction
    assert float((found * direction).sum()) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4)
    assert all(p.grad is None for p in sae.parameters())


def test_relearning_teaches_one_half_and_changes_neither_model_nor_edit(
    material: Material, facts: UnlearningData, edit: LatentEdit
) -> None:
    exam = Examination(material.site, [q for q in facts.questions if q.wording == "seen"])
    model, sae = material.site.subject.model, edit.sae
    before = [p.clone() for p in (*model.parameters(), *sae.parameters())]
    found = relearn(Edited("", material.site, edit=edit), facts, exam, rate=5e-3, at=(0, 50), batch=8)
    assert all(a.equal(b) for a, b in zip(before, (*model.parameters(), *sae.parameters()), strict=True))
    assert found.trained_curve[1] > 0.7 > found.trained_curve[0]
    _, others = halves(facts, 0)
    assert set(found.entities.tolist()) == others
    asked = [q for q in exam.questions if q.group == FORGET]
    assert found.trained.shape[1] + found.other.shape[1] == len(asked)
    again = relearn(Edited("", material.site, edit=edit), facts, exam, rate=5e-3, at=(0, 50), batch=8)
    assert (again.other == found.other).all()


def test_taking_an_edit_away_gives_the_model_back(material: Material, edit: LatentEdit, passages: Any) -> None:
    without = Edited("latents", material.site, edit=edit).without_edit()
    torch.testing.assert_close(without.logits(passages), material.site.logits(passages))


def planted(*shares: float) -> Relearned:
    """20 entities of 10 questions; after each number of steps the given share is right."""
    right = np.array([np.arange(200) % 10 < round(10 * share) for share in shares])
    return Relearned((0, 5, 20), right, right, np.repeat([f"e{i}" for i in range(20)], 10))


def test_what_comes_back_was_hidden_and_what_does_not_was_removed() -> None:
    never = planted(0.2, 0.2, 0.3)
    hidden, removed, kept = planted(0.3, 0.8, 0.9), planted(0.3, 0.3, 0.4), planted(0.9, 0.9, 1.0)
    assert hidden.back_after == 20
    assert removed.back_after is None
    assert "hides the facts" in verdict("A", hidden, never)
    assert "from 0.30 to 0.90 (0.9 after 20 steps)" in verdict("A", hidden, never)
    assert "does not show" in verdict("B", removed, never)
    assert "never forgotten" in verdict("C", kept, never)
    assert extra_gain(hidden, never)[0] == pytest.approx(0.55 - 0.05)


def test_what_was_pushed_below_not_knowing_and_came_back_that_far_was_not_hidden() -> None:
    never, pushed = planted(0.2, 0.2, 0.3), planted(0.0, 0.2, 0.3)
    assert extra_gain(pushed)[1].low > 0
    assert extra_gain(pushed, never)[1].low > 0
    assert share_above(pushed, never)[0] == 0.0
    assert "does not show" in verdict("A", pushed, never)
    assert share_above(planted(0.0, 0.8, 0.9), never)[0] == pytest.approx(0.6)
    assert "hides the facts" in verdict("B", planted(0.0, 0.8, 0.9), never)


def test_a_gain_of_one_entity_is_not_one_of_all() -> None:
    never, one = planted(0.2, 0.2, 0.2), planted(0.2, 0.2, 0.2)
    one.other[1:, :10] = True
    more, (low, high) = extra_gain(one, never)
    assert more == pytest.approx(0.8 / 20)
    assert low == 0.0 < high
    assert "does not show" in verdict("A", one, never)


def test_nothing_came_back_where_only_the_control_got_worse() -> None:
    worse, same = planted(0.3, 0.1, 0.1), planted(0.5, 0.5, 0.5)
    assert extra_gain(same, worse)[1].low > 0
    assert extra_gain(same)[0] == 0.0
    assert "does not show" in verdict("A", same, worse)
