"""The scores on other kinds of models: steering must be the same whatever their forward pass looks like."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saekit_steering.cluster import Cluster
from saekit_steering.continuations import continuations
from saekit_steering.prompts import Prompt, batches
from saekit_steering.scoring import Scorer, logit_lens
from saekit_steering.steering_vectors import latent_vectors, strengths
from saekit_steering.typical_tokens import typical_tokens

from saekit import Subject, TrainedPositions
from saekit.activations.sites import resolve
from saekit.builtin.architectures.standard import Standard
from saekit.testing.tiny import tiny_network

VOCABULARY, D = 60, 32
ROWS = [(0, 5, 6, 7), (0, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18)]  # the longer is beyond the sliding window


class Tokenizer(SimpleNamespace):
    """Ids as text."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(params=["gemma2", "llama"])
def context(request: pytest.FixtureRequest) -> Any:
    caps = {"sliding_window": 8, "final_logit_softcapping": 3.0} if request.param == "gemma2" else {}
    model = tiny_network(request.param, VOCABULARY, pad_token_id=1, initializer_range=0.2, **caps).eval()
    tokenizer = Tokenizer(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    subject = Subject(model, tokenizer, resolve(model, "blocks.1.hook_out"), name="tiny")
    sae = Standard(D, 40)
    sae.initialise(torch.Generator().manual_seed(0), torch.randn(50, D, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        sae.W_dec[0] /= sae.W_dec[0].norm()
        sae.W_enc[:, 0] = sae.W_dec[0]
        sae.b_enc[0] = 20.0
    return SimpleNamespace(sae=sae.eval(), source=SimpleNamespace(subject=subject), graph=None, scale=1.0)


def test_pushes_at_a_padded_batch_equal_a_hook_of_ones_own(context: Any) -> None:
    subject, sae = context.source.subject, context.sae
    typical = typical_tokens(torch.arange(1, 2 * VOCABULARY + 1).view(2, -1).flip(1) * 10, 10, 1)
    vector = latent_vectors(sae, 0, strengths([20.0], "absolute", 1.0, 1.0))[0]
    prompts = [Prompt("neutral", "", row) for row in ROWS]
    found = Scorer(context, Cluster(context, 0, 10), typical)([vector], batches(prompts, TrainedPositions(False), 512), {})

    def steered(module: Any, arguments: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, 1:] += 20.0 * sae.W_dec[0]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    kl = log_odds = 0.0
    for row in ROWS:
        ids = torch.tensor([row])
        with torch.no_grad():
            before = subject.model(ids, use_cache=False).logits.log_softmax(-1)[0, 1:]
            handle = subject.model.model.layers[1].register_forward_hook(steered)
            after = subject.model(ids, use_cache=False).logits.log_softmax(-1)[0, 1:]
            handle.remove()
        kl += float((before.exp() * (before - after)).sum())
        log_odds += float(typical.log_odds(after).sum())
    score = found.steered[0]["neutral"]
    assert kl > 0.01
    assert score.kl == pytest.approx(kl, rel=1e-3)
    assert score.log_odds == pytest.approx(log_odds, rel=1e-4, abs=1e-3)
    for number, row in enumerate(ROWS):
        change = found.readings[0][number][0] - found.readings_before[number][0]
        torch.testing.assert_close(change[:, 0], torch.full((len(row) - 1,), 20.0), atol=1e-2, rtol=0)


def test_controls_from_the_site_up_equal_whole_forwards(context: Any) -> None:
    typical = typical_tokens(torch.arange(1, 2 * VOCABULARY + 1).view(2, -1).flip(1) * 10, 10, 1)
    vector = latent_vectors(context.sae, 0, strengths([20.0], "absolute", 1.0, 1.0))[0]
    control = dataclasses.replace(vector, kind="other latent")
    prompts = [Prompt("neutral", "", row) for row in ROWS]
    found = Scorer(context, Cluster(context, 0, 10), typical)([vector, control], batches(prompts, TrainedPositions(False), 512), {})
    whole, above = (scores["neutral"] for scores in found.steered)
    for name in ("positions", "log_odds", "probability", "kl"):
        assert getattr(above, name) == pytest.approx(getattr(whole, name), rel=1e-4), name
    torch.testing.assert_close(above.f, whole.f, rtol=1e-5, atol=1e-5)


def test_texts_are_written_with_the_push_and_come_from_the_seed(context: Any) -> None:
    subject, sae = context.source.subject, context.sae
    typical = typical_tokens(torch.arange(1, 2 * VOCABULARY + 1).view(2, -1).flip(1) * 10, 10, 1)
    vector = latent_vectors(sae, 0, strengths([30.0], "absolute", 1.0, 1.0))[0]
    prompts = [Prompt("neutral", "", row) for row in ROWS]

    def write(seed: int) -> list[tuple[str, str, str]]:
        how = {"max_new_tokens": 12, "temperature": 1.0, "seed": seed}
        found = continuations(subject, prompts, vector, 0, typical, None, **how)
        return [(one.sampling, one.pair.before, one.pair.after) for one in found]

    first, again, other = write(0), write(0), write(1)
    assert first == again
    assert first[:2] == other[:2]  # greedy
    assert first[2:] != other[2:]
    assert any(before != after for _, before, after in first)


def test_the_logit_lens_reads_the_unembedding(context: Any) -> None:
    weight = context.source.subject.model.get_output_embeddings().weight
    assert int(logit_lens(context.source.subject, weight[7] * 5, 3)[0]) == int((weight @ weight[7]).argmax())
    assert logit_lens(context.source.subject, torch.randn(D + 1), 3) is None
