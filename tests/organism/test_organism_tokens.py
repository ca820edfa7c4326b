"""The corpus as tokens in the user's cache: made once, the same bits as made anew, and made again if it is damaged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saekit import organism
from saekit.activations.packing import TokenStore, tokenise
from saekit.builtin.sources.organism import OrganismSource
from saekit.organism import corpus, tokens


class Gathered:
    """Stands for `organism.documents` and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, split: str, kinds: list[str]) -> list[corpus.Document]:
        self.calls += 1
        return corpus.documents(split, kinds)


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gathered:
    """A small library, and a cache of the test's own."""
    held_out = next(n for n in corpus.module_names() if corpus.held_out(n))
    monkeypatch.setattr(corpus, "module_names", lambda: ["textwrap", "heapq", held_out])
    monkeypatch.setattr(corpus, "_library", corpus._library.__wrapped__)
    monkeypatch.setattr(tokens, "cache_directory", lambda: tmp_path / "cache")
    gathered = Gathered()
    monkeypatch.setattr(organism, "documents", gathered)
    return gathered


def same(one: dict[str, TokenStore], other: dict[str, TokenStore]) -> bool:
    return all(
        np.array_equal(getattr(one[split], name), getattr(other[split], name))
        and getattr(one[split], name).dtype == getattr(other[split], name).dtype
        for split in ("train", "held_out")
        for name in ("ids", "offsets", "hashes")
    )


def fresh(kind: str, tokenizer: Any) -> dict[str, TokenStore]:
    return {split: tokenise(corpus.documents(split, [kind]), tokenizer) for split in ("train", "held_out")}


@pytest.mark.parametrize("kind", ["code", "prose"])
def test_the_second_run_reads_the_same_tokens_and_parses_nothing(gathered: Gathered, kind: str, tiny_tokenizer: Any) -> None:
    first = tokens.corpus_tokens(kind, tiny_tokenizer)
    assert gathered.calls == 2
    second = tokens.corpus_tokens(kind, tiny_tokenizer)
    assert gathered.calls == 2
    assert same(first, second) and same(second, fresh(kind, tiny_tokenizer))
    assert first["train"].digest() == second["train"].digest()
    assert [path.suffix for path in tokens.cache_directory().iterdir()] == [".safetensors"]


def test_a_run_of_the_organism_gathers_its_corpus_once(gathered: Gathered) -> None:
    def first_block() -> tuple[torch.Tensor, dict[str, Any]]:
        source = OrganismSource(kinds=["facts"])
        source.open(device=torch.device("cpu"), dtype=torch.float32)
        return next(source.blocks("train", size=512, seed=0)).x, source.identity()

    (x, identity), (again, identity_again) = first_block(), first_block()
    assert gathered.calls == 2  # once for each split
    assert torch.equal(x, again)
    assert identity == identity_again


def test_what_the_tokens_follow_from_decides_which_file_is_read(
    gathered: Gathered, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens.corpus_tokens("code", tiny_tokenizer)
    names = corpus.module_names()[:1] + corpus.module_names()[2:]
    monkeypatch.setattr(corpus, "module_names", lambda: names)
    assert same(tokens.corpus_tokens("code", tiny_tokenizer), fresh("code", tiny_tokenizer))
    assert gathered.calls == 4
    monkeypatch.setattr(tokens.platform, "python_version", lambda: "3.99.0")
    tokens.corpus_tokens("code", tiny_tokenizer)
    assert gathered.calls == 6
    other = OrganismSource().load(torch.device("cpu"), torch.float32).tokenizer
    assert same(tokens.corpus_tokens("code", other), fresh("code", other))
    assert gathered.calls == 8


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_a_damaged_file_is_made_again(gathered: Gathered, tiny_tokenizer: Any, place: float) -> None:
    expected = tokens.corpus_tokens("facts", tiny_tokenizer)
    (path,) = tokens.cache_directory().iterdir()
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    assert same(tokens.corpus_tokens("facts", tiny_tokenizer), expected)
    assert gathered.calls == 4
    path.write_bytes(path.read_bytes()[:-100])
    assert same(tokens.corpus_tokens("facts", tiny_tokenizer), expected)
    tokens.corpus_tokens("facts", tiny_tokenizer)
    assert gathered.calls == 6


def test_of_several_that_begin_together_one_makes_it(gathered: Gathered, tiny_tokenizer: Any) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: tokens.corpus_tokens("facts", tiny_tokenizer), range(4)))
    assert gathered.calls == 2
    assert all(same(one, found[0]) for one in found)


def test_without_a_place_for_it_the_tokens_are_made_each_time(
    gathered: Gathered, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tokens, "cache_directory", lambda: tmp_path / "file" / "cache")
    for _ in range(2):
        assert same(tokens.corpus_tokens("facts", tiny_tokenizer), fresh("facts", tiny_tokenizer))
    assert gathered.calls == 4


def test_the_newest_files_are_kept(gathered: Gathered, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(7):
        monkeypatch.setattr(tokens.platform, "python_version", lambda n=n: f"3.99.{n}")
        tokens.corpus_tokens("facts", tiny_tokenizer)
    assert len(list(tokens.cache_directory().iterdir())) == 4
    tokens.corpus_tokens("facts", tiny_tokenizer)
    assert gathered.calls == 14
