"""How active latents are on prompts; the side effects of an edit on other text."""

from __future__ import annotations

import pytest
import torch
from saekit_attribution.ablate.side_effects import side_effects
from saekit_attribution.effects.control_latents import activity

import saekit
from saekit import TokenBatch, TrainedPositions
from saekit.activations.subject import Subject


def rows(n: int = 6, length: int = 10, seed: int = 3) -> list[list[int]]:
    drawn = torch.randint(2, 100, (n, length), generator=torch.Generator().manual_seed(seed))
    return [[0, *row] for row in drawn.tolist()]


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
