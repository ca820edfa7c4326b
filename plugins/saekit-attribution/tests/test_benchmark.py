"""The methods compared by the benchmark give the same answer."""

from __future__ import annotations

import pytest
import torch
from saekit_attribution.benchmark import KINDS, main, measure, plain_loop, random_samples
from saekit_attribution.effects.attribute import attribute

from saekit import organism
from saekit.activations.huggingface import load_subject


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_the_loop_and_atp_find_the_same_latents(tiny, kind: str) -> None:
    subject = tiny.subject(tiny.model(kind), "blocks.1.hook_out")
    subject.model.float()
    sae = tiny.sae(subject).float()
    samples = random_samples(subject, 12, 16, based=False)
    for (difference, top), found in zip(
        plain_loop(subject, sae, samples, top_k=5), attribute(subject, sae, samples), strict=True
    ):
        atp = found["atp"]
        order = atp.scores.abs().argsort(descending=True)[:5]
        assert [latent for latent, _ in top] == atp.latents[order].tolist()
        torch.testing.assert_close(torch.tensor([score for _, score in top]), atp.scores[order], rtol=0, atol=1e-4)
        assert atp.logit_diff == pytest.approx(difference, abs=1e-4)


@pytest.mark.parametrize("texts", KINDS)
@pytest.mark.parametrize("based", [False, True])
def test_samples_are_of_one_length_and_aligned(texts: str, based: bool) -> None:
    subject = load_subject(str(organism.directory()), "blocks.2.hook_out")
    samples = KINDS[texts](subject, 5, 33, based=based)
    assert {len(s.tokens) for s in samples} == {33}
    assert len({s.tokens for s in samples}) == 5
    for sample in samples:
        pairs = [(at, place) for at, place in enumerate(sample.aligned) if place >= 0]
        assert all(sample.tokens[at] == sample.base_tokens[place] for at, place in pairs)
        assert [place for _, place in pairs] == list(range(len(sample.base_tokens)))
        assert bool(pairs) == based


def test_a_measurement_has_seconds_and_ratios(tiny, gpt2) -> None:
    found = measure(gpt2, tiny.sae(gpt2), "random", 2, 16, rounds=2)
    assert set(found["seconds"]) >= {"loop", "atp", "exact"}
    assert found["ratios"]["loop_over_atp"]["median"] > 0
    assert all(not p.requires_grad and p.grad is None for p in gpt2.model.parameters())


def test_lengths_that_no_prompt_has_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--samples", "2", "--lengths", "5", "--texts", "prompts"])
    assert "--lengths 5: too short" in capsys.readouterr().err
