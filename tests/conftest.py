"""Fixtures shared by all tests: three tiny random models in Hugging Face format, and small files of text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saekit.testing.tiny import tiny_network


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


@pytest.fixture(scope="session")
def saved_network(tmp_path_factory, tiny_tokenizer) -> Callable[..., Path]:
    """Saves a `tiny_network` with the tokenizer."""

    def save(kind: str, **changes: Any) -> Path:
        directory = tmp_path_factory.mktemp("models") / f"tiny_{kind}"
        tiny_network(kind, VOCABULARY, **changes).save_pretrained(directory)
        tiny_tokenizer.save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def tiny_gpt2(saved_network: Callable[..., Path]) -> Path:
    """A GPT-2 of 3 blocks, 32 wide, 64 positions."""
    return saved_network("gpt2")


@pytest.fixture(scope="session")
def tiny_llama(saved_network: Callable[..., Path]) -> Path:
    """A Llama of 3 blocks, 32 wide, 64 positions, with grouped queries."""
    return saved_network("llama", num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="session")
def tiny_gemma2(saved_network: Callable[..., Path]) -> Path:
    """A Gemma-2 of 3 blocks, 32 wide, 64 positions, every other block with a sliding window."""
    return saved_network("gemma2")


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
