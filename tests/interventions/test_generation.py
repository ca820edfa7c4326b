"""Generation: with a cache and without it the same text, under an edit too; pairs that do not depend on their neighbours."""

from __future__ import annotations

import pytest
import torch
from interventions.models import TOKENS, Case, Plain, make_sae
from transformers import AutoTokenizer

import saekit
from saekit import UsageError

PROMPTS = ["Paragraph 3 speaks of winter", "copper", "the price of salt, at some length and in plain words", "a lamp"]
POSITIONS = {"everywhere": None, "slice": slice(4, 9), "list": [0, 13, 14], "function": lambda p: p % 3 == 0}


@pytest.fixture
def tokenizer(tiny_gpt2):
    return AutoTokenizer.from_pretrained(tiny_gpt2)


def greedy(case: Case, tokens=TOKENS, **options):
    return case.model.generate(
        tokens,
        attention_mask=options.pop("mask", torch.ones_like(tokens)),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def steered(case: Case, positions=None, **options):
    """An edit that is strong enough to change what is said."""
    sae = make_sae("topk", case.activation(case.middle))
    edits = {3: saekit.add(30.0 * float(case.activation(case.middle).std())), 8: saekit.ablate()}
    return saekit.attach(case.model, sae, case.middle, edits=edits, positions=positions, **options)


def same(a, b) -> None:
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
def test_cached_generation_is_the_uncached_one(language: Case, positions: str) -> None:
    plain = greedy(language, use_cache=True)
    same(plain, greedy(language, use_cache=False))
    with steered(language, POSITIONS[positions]):
        cached = greedy(language, use_cache=True)
    with steered(language, POSITIONS[positions]):
        same(cached, greedy(language, use_cache=False))
    assert not torch.allclose(torch.stack(plain.logits), torch.stack(cached.logits), atol=1e-3)
    same(plain, greedy(language, use_cache=True))


def test_codes_are_recorded_step_by_step(language: Case) -> None:
    with steered(language, record=True) as attached:
        for _ in range(2):  # a new prompt begins a new record
            greedy(language, use_cache=True)
            assert [len(code) for code in attached.codes] == [TOKENS.numel()] + [2] * 9
            assert torch.equal(attached.code.dense(), attached.codes[-1].dense())


@pytest.mark.parametrize("positions", POSITIONS)
def test_left_padding_does_not_change_what_a_prompt_gives(language: Case, positions: str) -> None:
    mask = torch.ones_like(TOKENS)
    mask[1, :5] = 0
    with steered(language, POSITIONS[positions]):
        together = greedy(language, TOKENS * mask + (1 - mask), mask=mask)
        alone = greedy(language, TOKENS[1:, 5:])
    assert torch.equal(together.sequences[1, 12:], alone.sequences[0, 7:])
    ours, theirs = torch.stack(together.logits)[:, 1], torch.stack(alone.logits)[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("do_sample", [False, True])
def test_pairs_are_what_generate_gives_and_do_not_depend_on_their_neighbours(
    language: Case, tokenizer, do_sample: bool
) -> None:
    state = torch.get_rng_state()

    def pairs(prompts, **options):
        settings = {"max_new_tokens": 8, "do_sample": do_sample, "temperature": 1.3, "seed": 4, **options}
        return saekit.paired_generation(language.model, tokenizer, prompts, steered(language), **settings)

    first = pairs(PROMPTS)
    assert [pair.prompt for pair in first] == PROMPTS
    assert pairs(PROMPTS) == first
    assert pairs(PROMPTS[::-1]) == first[::-1]
    assert pairs(PROMPTS[1:2]) + pairs(PROMPTS[:1]) == [first[1], first[0]]
    assert pairs(PROMPTS, batch_size=3) == first
    assert pairs([tokenizer(prompt)["input_ids"] for prompt in PROMPTS]) == first
    assert (pairs(PROMPTS, seed=5) == first) is not do_sample
    assert torch.equal(torch.get_rng_state(), state)
    assert any(pair.before != pair.after for pair in first)
    for pair in first:
        assert pair.before == tokenizer.decode(pair.before_tokens, skip_special_tokens=True)
        assert pair.after == tokenizer.decode(pair.after_tokens, skip_special_tokens=True)
        assert 1 <= len(pair.before_tokens) <= 8
    if not do_sample:
        ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
        plain = language.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert plain[0, ids.shape[1] :].tolist() == first[0].before_tokens


def test_an_edit_that_changes_nothing_gives_the_same_sampled_text(language: Case, tokenizer) -> None:
    """The same random numbers before and after: a difference is the edit's."""
    sae = make_sae("topk", language.activation(language.middle))
    nothing = saekit.attach(language.model, sae, language.middle, edits={3: saekit.scale(1.0)})
    pairs = saekit.paired_generation(language.model, tokenizer, PROMPTS, nothing, do_sample=True, max_new_tokens=12)
    assert all(pair.before_tokens == pair.after_tokens for pair in pairs)
    assert len({tuple(pair.before_tokens) for pair in pairs}) == len(PROMPTS)


def test_several_attachments_and_none(gpt2: Case, tokenizer) -> None:
    sae = make_sae("topk", gpt2.activation(gpt2.above))
    second = saekit.attach(gpt2.model, sae, gpt2.above, mode="no_change")
    (both,) = saekit.paired_generation(gpt2.model, tokenizer, PROMPTS[:1], [steered(gpt2), second])
    (one,) = saekit.paired_generation(gpt2.model, tokenizer, PROMPTS[:1], [steered(gpt2)])
    (none,) = saekit.paired_generation(gpt2.model, tokenizer, PROMPTS[:1], [])
    assert none.before_tokens == none.after_tokens == one.before_tokens == both.before_tokens
    assert both.after_tokens != one.after_tokens


def test_tokens_end_with_the_first_eos(gpt2: Case, tokenizer) -> None:
    """Every token but one is made unlikely, so the text ends at once, in a batch too."""
    ids = tokenizer(PROMPTS[0])["input_ids"]
    first = saekit.paired_generation(gpt2.model, tokenizer, [ids], [], max_new_tokens=6)[0].before_tokens
    gpt2.model.generation_config.eos_token_id = [first[2], 1]
    pairs = saekit.paired_generation(gpt2.model, tokenizer, PROMPTS, [], max_new_tokens=6, batch_size=4)
    place = first.index(first[2])
    assert pairs[0].before_tokens == first[: place + 1]
    assert all(first[2] not in pair.before_tokens[:-1] for pair in pairs)


def test_what_cannot_be_generated_is_refused(gpt2: Case, tokenizer) -> None:
    attached = steered(gpt2)

    def refused(message: str, model=gpt2.model, prompts=PROMPTS, attachments=attached, **options) -> None:
        with pytest.raises(UsageError, match=message):
            saekit.paired_generation(model, tokenizer, prompts, attachments, **options)

    refused("Plain has no `generate`", model=Plain().eval())
    refused(r"prompt 1 \(''\) has no tokens", prompts=["a", ""])
    refused("temperature must be above 0", do_sample=True, temperature=0.0)
    refused("temperature must be above 0", do_sample=True, temperature=float("nan"))
    refused("max_new_tokens must be above 0", max_new_tokens=0)
    refused("batch_size must be above 0", batch_size=0)
    with attached:
        refused("is attached already, so there would be no 'before'")
        gpt2.logits()
    refused("counts from the end of the text", attachments=steered(gpt2, positions=[-1]))
    gpt2.model.train()
    refused(r"in training mode, where dropout differs. Call model.eval\(\)")


@pytest.mark.slow
class TestOnABridge:
    @pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
    def bridge(self, request, tokenizer):
        from transformer_lens.model_bridge import TransformerBridge

        directory = request.getfixturevalue(request.param)
        return TransformerBridge.boot_transformers(str(directory), device="cpu").eval()

    @pytest.fixture
    def plain(self, bridge, request) -> Case:
        from interventions.models import language_case

        name = "tiny_gpt2" if bridge.original_model.config.model_type == "gpt2" else "tiny_llama"
        return language_case(request.getfixturevalue(name))

    @pytest.mark.parametrize("positions", POSITIONS)
    def test_attached_it_gives_what_the_plain_model_gives(self, bridge, plain: Case, positions: str) -> None:
        on_plain = steered(plain, POSITIONS[positions])
        for at in ("blocks.1.hook_out", "blocks.2.hook_in"):
            on_bridge = saekit.attach(
                bridge, on_plain.sae, at, edits={3: saekit.add(1.0)}, positions=POSITIONS[positions], record=True
            )
            same_on_plain = saekit.attach(
                plain.model, on_plain.sae, at, edits={3: saekit.add(1.0)}, positions=POSITIONS[positions]
            )
            with on_bridge, same_on_plain, torch.no_grad():
                torch.testing.assert_close(bridge(TOKENS), plain.logits(), rtol=1e-3, atol=1e-4)
                assert len(on_bridge.code) == TOKENS.numel()

    def test_cached_is_uncached_and_the_hooks_are_gone(self, bridge, plain: Case) -> None:
        sae = steered(plain).sae
        settings = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "stop_at_eos": False}
        before = bridge.generate(TOKENS, **settings)
        for positions in POSITIONS.values():
            made = []
            for cached in (True, False):
                edit = saekit.attach(bridge, sae, "blocks.1.hook_out", edits={3: saekit.add(2.0)}, positions=positions)
                with edit:
                    made.append(bridge.generate(TOKENS, use_past_kv_cache=cached, **settings))
            assert torch.equal(*made)
        assert torch.equal(bridge.generate(TOKENS, **settings), before)

    def test_pairs(self, bridge, plain: Case, tokenizer) -> None:
        sae = steered(plain).sae

        def pairs(model, prompts, **options):
            edit = saekit.attach(model, sae, "blocks.1.hook_out", edits={3: saekit.add(2.0)}, positions=slice(1, None))
            return saekit.paired_generation(model, tokenizer, prompts, edit, max_new_tokens=8, seed=3, **options)

        greedy_pairs = pairs(bridge, PROMPTS)
        assert greedy_pairs == pairs(plain.model, PROMPTS)
        assert greedy_pairs == pairs(bridge, PROMPTS, batch_size=4)
        sampled = pairs(bridge, PROMPTS, do_sample=True)
        assert sampled == pairs(bridge, PROMPTS[::-1], do_sample=True)[::-1]
        assert sampled != greedy_pairs

    def test_the_guard(self, bridge) -> None:
        saekit.ensure_downstream(bridge, "blocks.1.hook_in", "blocks.1.mlp.hook_out", TOKENS)
        with pytest.raises(UsageError, match="not downstream"):
            saekit.ensure_downstream(bridge, "blocks.1.mlp.hook_out", "blocks.1.hook_in", TOKENS)
        with pytest.raises(UsageError, match="Did you mean 'blocks.1.mlp.hook_out'"):
            saekit.ensure_downstream(bridge, "blocks.1.mpl.hook_out", "blocks.1.hook_in", TOKENS)
