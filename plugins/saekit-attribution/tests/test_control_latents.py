"""Control latents resemble the chosen ones; the side effects of an edit on other text."""

from __future__ import annotations

import pytest
import torch
from saekit_attribution.ablate.side_effects import side_effects
from saekit_attribution.effects.control_latents import Activity, activity, matched_controls

import saekit
from saekit import TokenBatch, TrainedPositions
from saekit.activations.subject import Subject


def rows(n: int = 6, length: int = 10, seed: int = 3) -> list[list[int]]:
    drawn = torch.randint(2, 100, (n, length), generator=torch.Generator().manual_seed(seed))
    return [[0, *row] for row in drawn.tolist()]


def found(n: int = 400, seed: int = 0) -> Activity:
    generator = torch.Generator().manual_seed(seed)
    return Activity(10 ** -(3 * torch.rand(n, generator=generator)), 10 ** torch.randn(n, generator=generator))


def test_controls_are_others_and_all_different() -> None:
    chosen = list(range(0, 200, 2))
    drawn = matched_controls(chosen, found(), torch.Generator().manual_seed(0))
    assert len(set(drawn)) == len(drawn) == 100
    assert not set(drawn) & set(chosen)


def test_controls_are_far_more_like_the_chosen_than_any_others() -> None:
    seen, chosen = found(), list(range(20))
    drawn = matched_controls(chosen, seen, torch.Generator().manual_seed(0))
    place = torch.stack([seen.density.log(), seen.mean.log()], 1)
    near = (place[drawn] - place[chosen]).norm(dim=1).mean()
    anyone = (place[200:220] - place[chosen]).norm(dim=1).mean()
    assert near < 0.4 * anyone


def test_the_seed_decides_the_draw() -> None:
    draws = [matched_controls(list(range(20)), found(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_latents_that_are_not_active_on_the_prompts_are_never_drawn() -> None:
    density = torch.tensor([0.5, 0.5, 0.0, 0.4, 0.0])
    drawn = matched_controls([0, 1], Activity(density, torch.ones(5)), torch.Generator().manual_seed(0))
    assert drawn == [3]


def test_activity_is_that_of_the_whole_code(tiny, gpt2: Subject) -> None:
    sae = tiny.sae(gpt2)
    batches = [TokenBatch.of_rows(rows(), TrainedPositions(False)), TokenBatch.of_rows(rows(4, 7), TrainedPositions(False))]
    seen = activity(gpt2, sae, batches)
    code = torch.cat([sae.encode(gpt2.activations(b)[:, 1:].flatten(0, 1)).dense() for b in batches])
    torch.testing.assert_close(seen.density, (code != 0).float().mean(0))
    mean = code.sum(0) / (code != 0).sum(0).clamp_min(1)
    torch.testing.assert_close(seen.mean, mean.float())


def test_an_edit_that_changes_nothing_does_no_damage(tiny, gpt2: Subject) -> None:
    sae = tiny.sae(gpt2)
    same = saekit.attach(gpt2.model, sae, gpt2.site, edits={j: saekit.scale(1.0) for j in range(sae.d_sae)})
    done = side_effects(gpt2, same, [TokenBatch.of_rows(rows(), TrainedPositions(False))])
    assert done.tokens == 6 * 9
    assert done.kl == pytest.approx(0, abs=1e-6)
    assert done.rise == pytest.approx(0, abs=1e-6)


def test_damage_is_what_the_edited_model_says(tiny, gpt2: Subject) -> None:
    sae, batch = tiny.sae(gpt2), TokenBatch.of_rows(rows(), TrainedPositions(False))
    edit = saekit.attach(gpt2.model, sae, gpt2.site, edits={j: saekit.ablate() for j in range(0, sae.d_sae, 2)})
    done = side_effects(gpt2, edit, [batch])
    before = gpt2.logits(batch)[:, 1:-1].float().log_softmax(-1)
    with edit:
        after = gpt2.logits(batch)[:, 1:-1].float().log_softmax(-1)
    targets = batch.tokens[:, 2:, None]
    assert done.ce_before == pytest.approx(-float(before.gather(2, targets).mean()), abs=1e-5)
    assert done.ce_after == pytest.approx(-float(after.gather(2, targets).mean()), abs=1e-5)
    assert done.kl == pytest.approx(float((before.exp() * (before - after)).sum(2).mean()), abs=1e-5)
    assert done.kl > 1e-3


def test_without_text_there_is_no_damage_to_state(tiny, gpt2: Subject) -> None:
    sae = tiny.sae(gpt2)
    with pytest.raises(ValueError, match="no held-out text"):
        side_effects(gpt2, saekit.attach(gpt2.model, sae, gpt2.site, edits={0: saekit.ablate()}), [])
