"""The subject reads what transformers and TransformerLens read."""

import shutil
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from saekit.activations.batch import TokenBatch
from saekit.activations.huggingface import load_subject, peek_model
from saekit.activations.trained_positions import TrainedPositions
from saekit.errors import UsageError

MODELS = ["tiny_gpt2", "tiny_llama", "tiny_gemma2"]


@pytest.fixture(params=MODELS)
def directory(request):
    return request.getfixturevalue(request.param)


def batch(padded=0):
    tokens = torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        mask[-1, -padded:] = False
    return TokenBatch(tokens, mask, mask, torch.arange(3))


def test_activations_and_logits_are_those_of_transformers(directory):
    subject = load_subject(str(directory), "blocks.1.hook_out")
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        expected = model(batch().tokens, output_hidden_states=True)
    assert torch.equal(subject.activations(batch()), expected.hidden_states[2])
    assert torch.equal(subject.logits(batch()), expected.logits)
    assert not subject.activations(batch()).requires_grad
    assert not any(p.requires_grad for p in subject.model.parameters()) and not subject.model.training


def test_padding_changes_nothing_at_the_positions_before_it(directory):
    subject = load_subject(str(directory), "blocks.2.hook_out")
    whole, padded = subject.activations(batch()), subject.activations(batch(padded=10))
    mask = batch(padded=10).mask
    torch.testing.assert_close(padded[mask], whole[mask], atol=1e-5, rtol=1e-5)


def test_what_is_known_of_a_model(directory):
    subject = load_subject(str(directory), "blocks.0.hook_out")
    assert (subject.width(), subject.context, subject.bos_token_id) == (32, 64, 0)
    peeked = peek_model(str(directory))
    assert (peeked["hidden_size"], peeked["layers"], peeked["context"]) == (32, 3, 64)


def test_replaced_reaches_the_logits_and_ends(directory):
    subject = load_subject(str(directory), "blocks.1.hook_out")
    plain = subject.logits(batch())
    with subject.replaced(torch.zeros_like):
        changed = subject.logits(batch())
    assert not torch.allclose(plain, changed)
    assert torch.equal(subject.logits(batch()), plain)


def test_another_thread_never_sees_a_replaced_activation(tiny_gpt2):
    subject = load_subject(str(tiny_gpt2), "blocks.1.hook_out")
    plain, seen = subject.activations(batch()), []
    with subject.replaced(torch.zeros_like):
        thread = threading.Thread(target=lambda: seen.append(subject.activations(batch())))
        thread.start()
        time.sleep(0.05)
        assert not seen
    thread.join()
    assert torch.equal(seen[0], plain)


def test_the_digest_follows_the_weights(tiny_gpt2, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(tiny_gpt2, copied)
    first = load_subject(str(tiny_gpt2), "blocks.1.hook_out").digest()
    assert load_subject(str(copied), "blocks.0.hook_in").digest() == first
    model = AutoModelForCausalLM.from_pretrained(copied)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] += 1
    model.save_pretrained(copied)
    assert load_subject(str(copied), "blocks.1.hook_out").digest() != first


def test_a_site_without_one_vector_a_position_is_refused(tiny_gpt2):
    with pytest.raises(UsageError, match=r"for 2 rows of 3 tokens .* shape \[1, 3, 32\]"):
        load_subject(str(tiny_gpt2), "transformer.wpe").width()  # one row of positions, whatever the tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_residual_names_are_those_of_transformer_lens(name, request):
    from transformer_lens.model_bridge import TransformerBridge

    directory = str(request.getfixturevalue(name))
    bridge = TransformerBridge.boot_transformers(directory, device="cpu")
    for hook in [f"blocks.{i}.hook_{side}" for i in range(3) for side in ("in", "out")]:
        _, cache = bridge.run_with_cache(batch().tokens, names_filter=[hook])
        ours = load_subject(directory, hook).activations(batch())
        torch.testing.assert_close(ours, cache[hook], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_any_other_hook_is_found_on_a_bridge(tiny_gpt2):
    subject = load_subject(str(tiny_gpt2), "blocks.1.mlp.hook_out")
    plain = load_subject(str(tiny_gpt2), "transformer.h.1.mlp")
    torch.testing.assert_close(subject.activations(batch()), plain.activations(batch()), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(subject.logits(batch()), plain.logits(batch()), atol=1e-4, rtol=1e-4)
    assert (subject.width(), subject.context) == (32, 64)
    with subject.replaced(torch.zeros_like), plain.replaced(torch.zeros_like):
        torch.testing.assert_close(subject.logits(batch()), plain.logits(batch()), atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match=r"shape \[2, 2, 3, 3\]"):
        load_subject(str(tiny_gpt2), "blocks.1.attn.hook_pattern").width()
    with pytest.raises(UsageError, match="Did you mean 'blocks.1.mlp.hook_out'"):
        load_subject(str(tiny_gpt2), "blocks.1.mpl.hook_out")


def test_rows_of_tokens_are_padded_on_the_right_and_only_tokens_are_kept() -> None:
    batch = TokenBatch.of_rows([(5, 6, 7), (8, 9)])
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.keep.tolist() == batch.mask.tolist()
    some = TokenBatch.of_rows([(5, 6, 7), (8, 9)], TrainedPositions(False, (9,)))
    assert some.keep.tolist() == [[False, True, True], [False, False, False]]
    assert batch.sequence.tolist() == [0, 1]
