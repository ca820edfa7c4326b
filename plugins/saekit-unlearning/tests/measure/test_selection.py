"""Planted latents are found, attribution equals exact ablation where the model is linear, and controls are matched."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from saekit_unlearning.activity import Activity
from saekit_unlearning.answers import log_likelihoods
from saekit_unlearning.edits import Ablate, Clamp, Codes, LatentEdit
from saekit_unlearning.interventions import operations
from saekit_unlearning.latent_methods import Grid, attribution, greedy, sparsity
from saekit_unlearning.selection import _attributions, by_attribution, by_sparsity, greedily

GRID = Grid(numbers=[2, 100], ablate=True, clamps=[25.0], rms_clamps=[2.0], paths=["spliced", "error_kept"])


def test_every_selection_finds_the_planted_latents(planted) -> None:
    seen = planted.seen()
    assert set(by_sparsity(seen.on_forget.rate, seen.on_retain.rate, 0.01)) == set(planted.forget)
    assert set(by_attribution(seen)) == set(planted.forget)
    assert set(greedily(seen, [2, 4, 100])) == set(planted.forget)


def test_sparsity_is_the_rule_of_saebench() -> None:
    """Against the rule written out: rates at the threshold are out, silent latents are out, the most active come first."""
    generator = torch.Generator().manual_seed(0)
    forget, retain = (torch.randint(0, 20, (64,), generator=generator) / 20 for _ in range(2))
    for threshold in (0.05, 0.5, 1.0):
        kept = [j for j in range(64) if retain[j] < threshold and forget[j] > 0]
        assert by_sparsity(forget, retain, threshold) == sorted(kept, key=lambda j: -float(forget[j]))


def test_a_latent_of_other_text_is_no_candidate(planted) -> None:
    """The first entity to be forgotten is named in other text as well."""
    seen = dataclasses.replace(planted.seen(), general=[[0, 3, 1]])
    assert sparsity([0.01], GRID).prepare(seen).candidates == planted.each - 1


def test_attribution_is_the_exact_effect_where_the_margin_is_linear(planted) -> None:
    seen = planted.seen()
    forget, retain = _attributions(seen, [])

    @torch.no_grad()
    def margins(edit: LatentEdit | None) -> dict[bool, float]:
        sums = {True: [], False: []}
        for passages, rows in seen.examination.batches():
            for own, row in zip(seen.site.logits(passages, edit), rows, strict=True):
                asked, found = seen.questions[row.question], log_likelihoods(own, row)
                others = [i for i in range(4) if i != asked.answer]
                sums[seen.forgets(asked)].append(float(found[asked.answer] - found[others].mean()))
        return {kind: sum(values) / len(values) for kind, values in sums.items()}

    before = margins(None)
    for latent in range(seen.sae.d_sae):
        after = margins(LatentEdit(seen.sae, torch.tensor([latent]), Ablate(), "error_kept"))
        assert float(forget[latent]) == pytest.approx(before[True] - after[True], abs=1e-6)
        assert float(retain[latent]) == pytest.approx(before[False] - after[False], abs=1e-6)


def test_greedy_leaves_out_what_was_chosen(planted) -> None:
    seen = planted.seen()
    chosen = planted.forget[:3]
    assert set(by_attribution(seen, chosen)) == set(planted.forget[3:])


def test_activity_adds_up(planted) -> None:
    seen = planted.seen()
    both = Activity.of(seen.sae, seen.passages([*seen.forget, *seen.retain]))
    assert torch.equal((seen.on_forget + seen.on_retain).rate, both.rate)
    assert torch.equal((seen.on_forget + seen.on_retain).rms, both.rms)
    assert both.rms[planted.forget].tolist() == [1.0] * planted.each


def test_methods_try_every_setting_on_both_paths(planted) -> None:
    seen = planted.seen()
    for method, rankings in ((sparsity([0.01, 0.1], GRID), 2), (attribution(GRID), 1), (greedy(GRID), 1)):
        prepared = method.prepare(seen)
        assert prepared.candidates == planted.each
        assert len(prepared.trials) == rankings * 2 * 3 * 2
        assert {len(trial.latents) for trial in prepared.trials} == {2, planted.each}  # 100 are not there
        labels = {path: [t.label for t in prepared.trials if t.path == path] for path in GRID.paths}
        assert labels["spliced"] == labels["error_kept"] and len(set(labels["spliced"])) == len(labels["spliced"])


def test_clamps_act_where_a_latent_is_active() -> None:
    rms = torch.tensor([1.0, 3.0])
    made = operations(ablate=True, clamps=[25.0], rms_clamps=[2.0], rms=rms)
    active, latents = torch.tensor([[0.5, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    assert made["ablated"](active, latents).tolist() == [[0, 0], [0, 0]]
    assert made["clamped to -25"](active, latents).tolist() == [[-25, 0], [0, -25]]
    assert made["clamped to -2 RMS"](active, latents).tolist() == [[-2, 0], [0, -6]]


def test_codes_are_those_of_the_sae(planted) -> None:
    seen = planted.seen()
    codes = Codes(seen.sae)
    for passages in seen.passages(seen.forget):
        edits = [LatentEdit(seen.sae, torch.tensor([1, 2]), Clamp(3.0), "spliced", own) for own in (None, codes, codes)]
        first, *others = (edit(passages) for edit in edits)
        assert all(torch.equal(first, other) for other in others)
