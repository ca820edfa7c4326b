"""Fixtures shared by all tests: three tiny random models in Hugging Face format, and small files of text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that several test processes end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


VOCABULARY = 320
BOS, EOS = "<s>", "</s>"

PARAGRAPHS = [
    f"Paragraph {i} speaks of {what}, at some length and in plain words.\nIt has a second line: {'again ' * (i % 7)}."
    for i, what in enumerate(["harbours", "lamps", "winter", "the price of salt", "copper wire", "a long bridge"] * 8)
]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer with BOS (0) and EOS (1); it adds neither by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PARAGRAPHS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def _saved(model_class, config, tokenizer, directory: Path) -> Path:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory, tiny_tokenizer) -> Path:
    """A GPT-2 of 3 blocks, 32 wide, 64 positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=1
    )
    return _saved(GPT2LMHeadModel, config, tiny_tokenizer, tmp_path_factory.mktemp("models") / "tiny_gpt2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tiny_tokenizer) -> Path:
    """A Llama of 3 blocks, 32 wide, 64 positions, with grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return _saved(LlamaForCausalLM, config, tiny_tokenizer, tmp_path_factory.mktemp("models") / "tiny_llama")


@pytest.fixture(scope="session")
def tiny_gemma2(tmp_path_factory, tiny_tokenizer) -> Path:
    """A Gemma-2 of 3 blocks, 32 wide, 64 positions, every other block with a sliding window."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return _saved(Gemma2ForCausalLM, config, tiny_tokenizer, tmp_path_factory.mktemp("models") / "tiny_gemma2")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """48 paragraphs in one .txt file."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def jsonl_file(tmp_path_factory) -> Path:
    """The same 48 paragraphs as lines of JSON, under "text"."""
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text("".join(json.dumps({"n": i, "text": t}) + "\n" for i, t in enumerate(PARAGRAPHS)), encoding="utf-8")
    return path
