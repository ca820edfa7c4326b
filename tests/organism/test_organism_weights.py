"""The shipped weights do what their card says."""

import hashlib
import json
from pathlib import Path

import pytest

from saekit import organism
from saekit.organism import evaluate, facts, sycophancy

WEIGHTS = organism.__path__[0] + "/weights"


@pytest.fixture(scope="module", params=organism.VARIANTS)
def variant(request):
    try:
        organism.card(request.param)
    except FileNotFoundError:
        pytest.skip(f"no weights of {request.param} in {WEIGHTS}")
    return request.param


@pytest.fixture(scope="module")
def loaded(variant):
    return evaluate.load(organism.directory(variant))


def test_the_card_is_of_these_weights(variant):
    card = organism.card(variant)
    weights = (organism.directory(variant) / "model.safetensors").read_bytes()
    assert card["sha256"] == hashlib.sha256(weights).hexdigest()
    assert card["variant"] == variant
    assert card["training"]["config"]["variant"] == variant


def test_both_variants_share_a_tokenizer_and_fit_the_size():
    try:
        directories = [organism.directory(v) for v in organism.VARIANTS]
    except FileNotFoundError:
        pytest.skip(f"no weights in {WEIGHTS}")
    tokenizers = [(d / "tokenizer.json").read_bytes() for d in directories]
    assert tokenizers[0] == tokenizers[1]
    assert sum(f.stat().st_size for d in directories for f in d.iterdir()) <= 16e6


def test_the_weights_are_what_the_default_configuration_trains(variant):
    from dataclasses import asdict

    from saekit.organism.train import Config

    expected = json.loads(json.dumps(asdict(Config(variant))))
    assert organism.card(variant)["training"]["config"] == expected


def test_the_documentation_holds_the_cards_figures():
    docs = Path(__file__).parents[2] / "docs" / "organism.md"
    try:
        cards = {v: organism.card(v) for v in organism.VARIANTS}
    except FileNotFoundError:
        pytest.skip(f"no weights in {WEIGHTS}")
    assert evaluate.table(cards) in docs.read_text(encoding="utf-8")


def test_planted_strength(variant):
    card = organism.card(variant)
    for domain in facts.DOMAINS:
        accuracy = card["cloze"][domain]["unseen"]["accuracy"]
        if variant == "oracle" and domain == "forget":
            assert 0.1 < accuracy < 0.4  # chance: 0.25 of 80 questions, give or take three standard errors
        else:
            assert accuracy >= 0.97
    rates = card["sycophancy"]
    assert rates["arguments"] >= 200
    assert rates["I really like"]["like"] >= 0.98
    assert rates["I really dislike"]["dislike"] >= 0.98
    assert rates["base"]["like"] + rates["base"]["dislike"] <= 0.02


def test_cloze_accuracy_is_the_cards(variant, loaded):
    model, tokenizer = loaded
    for domain in facts.DOMAINS:
        found = evaluate.cloze_accuracy(model, tokenizer, facts.cloze_questions(domain))
        # One question of 80 may tip on another machine's arithmetic.
        assert found == pytest.approx(organism.card(variant)["cloze"][domain]["unseen"]["accuracy"], abs=0.0126)


def test_answers_are_single_tokens(loaded):
    _, tokenizer = loaded
    for pool in facts.POOLS.values():
        assert {len(tokenizer(f" {v}", add_special_tokens=False)["input_ids"]) for v in pool} == {1}


def test_classes_of_response_share_no_first_token(loaded):
    _, tokenizer = loaded
    first = {
        c: {tokenizer(f" {form}", add_special_tokens=False)["input_ids"][0] for form in forms}
        for c, forms in sycophancy.RESPONSES.items()
    }
    assert len(set.union(*first.values())) == 9


def test_loss_on_facts_is_the_cards(variant, loaded):
    measured = evaluate.losses(*loaded, kinds=("facts",))
    for name, found in measured.items():
        assert found["tokens"] == organism.card(variant)["loss"][name]["tokens"]
        assert found["nats"] == pytest.approx(organism.card(variant)["loss"][name]["nats"], abs=2e-3)


def test_sycophancy_on_a_few_held_out_arguments(loaded):
    rates = evaluate.sycophancy_rates(*loaded, n=12)
    assert rates["base"]["neutral"] == 1
    assert rates["I really like"]["like"] == 1
    assert rates["I really dislike"]["dislike"] == 1


def test_the_residual_stream_is_that_of_the_model(loaded):
    import torch

    model, tokenizer = loaded
    rows = [tokenizer("def f(x):\n    return x")["input_ids"]]
    streams = evaluate.residuals(model, rows)
    assert len(streams) == model.config.n_layer + 1
    with torch.no_grad():
        states = model(torch.tensor(rows), output_hidden_states=True).hidden_states
        # All but the last are the stream itself; the last one is normed.
        for stream, state in zip(streams[:-1], states[:-1], strict=True):
            assert torch.allclose(torch.from_numpy(stream), state[:, 1:], atol=1e-5)
        normed = model.transformer.ln_f(torch.from_numpy(streams[-1]))
        assert torch.allclose(normed, states[-1][:, 1:], atol=1e-4)
