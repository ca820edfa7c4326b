"""Held-out data: a small budget sees text from all over the split, every metric the same, and how much is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saekit import Component
from saekit.activations.cache import CachedSource
from saekit.builtin.sources.text import TextSource
from saekit.runner.held_out import ENOUGH, notes
from saekit.testing import registry_of, tiny_language_run, tiny_run

N = 300


@pytest.fixture
def source(tiny_gpt2: Path, tmp_path: Path) -> TextSource:
    """A file whose first half is about one thing and whose second half about another."""
    lines = [json.dumps({"text": f"{'lamps' if n < N // 2 else 'copper'} number {n} and some more words"}) for n in range(N)]
    (tmp_path / "halves.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return TextSource(
        model=str(tiny_gpt2), data=str(tmp_path / "halves.jsonl"), hook_point="blocks.0.hook_out", context=16, held_out=0.5
    )


def opened(source):
    source.open(device=torch.device("cpu"), dtype=torch.float32)
    return source


def test_a_small_budget_sees_both_halves_of_the_file(source: TextSource, tmp_path: Path) -> None:
    plain = opened(source)
    whole = torch.cat([block.sequence for block in plain.blocks("held_out", size=10**6, seed=0)]).unique()
    documents = plain.documents(whole)
    last = int(documents.max())
    some = next(plain.blocks("held_out", size=len(whole) * 15 // 8, seed=0))  # an eighth of it
    share = (plain.documents(some.sequence)[:, 0] < last / 2).double().mean()
    assert 0.25 < float(share) < 0.75
    cached = opened(CachedSource(plain, tmp_path / "cache"))
    cached.fill()
    again = next(cached.blocks("held_out", size=len(some), seed=0))
    assert torch.equal(again.tokens[: len(some)], some.tokens)
    read = opened(CachedSource(source, tmp_path / "cache"))
    assert torch.equal(read.documents(whole), documents) and not read._opened


def test_a_smaller_budget_is_the_beginning_of_a_larger_one_for_activations_and_tokens(source: TextSource) -> None:
    given = next(opened(source).blocks("held_out", size=200, seed=0))
    larger = torch.cat([block.tokens for block in source.blocks("held_out", size=1000, seed=3)])
    rows = next(source.token_batches("held_out", rows=8))
    assert torch.equal(larger[: len(given)], given.tokens)
    assert torch.equal(rows.tokens[rows.keep], larger[: int(rows.keep.sum())])


class Greedy:
    """A metric of somebody else's, which takes what it likes and says nothing of it."""

    def __init__(self, *, tokens: int = 60) -> None:
        self.tokens = tokens

    def measure(self, context) -> dict[str, float | None]:
        """How many it saw."""
        for _ in range(2):  # seen twice, counted once
            seen = sum(len(step.x) for step in context.held_out(self.tokens))
        return {"greedy": float(seen)}


def test_what_each_metric_saw_is_in_the_summary(tmp_path: Path) -> None:
    registry = registry_of(metric=Component("greedy", Greedy))
    metric = [{"use": "explained_variance"}, {"use": "ce_recovered", "tokens": 50, "rows": 2}, {"use": "greedy", "tokens": 40}]
    run = tiny_language_run(tmp_path / "run", registry=registry, metric=metric)
    told = run.summary["held_out"]
    assert told["greedy"]["tokens"] == 40
    assert 50 <= told["ce_recovered"]["tokens"] <= 100
    assert told["explained_variance"]["tokens"] > told["ce_recovered"]["tokens"]
    for of in told.values():
        assert 0 < of["documents"] <= of["sequences"] < of["tokens"]
    assert "ce_recovered" in run.summary["notes"][0] and "documents" in run.summary["notes"][0]
    page = (run.directory / "report.html").read_text(encoding="utf-8")
    assert f"greedy: 40 tokens of {told['greedy']['documents']} documents" in page
    assert run.summary["notes"][0] in page


def test_a_source_without_documents_counts_rows(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    assert {(of["tokens"], of["documents"]) for of in run.summary["held_out"].values()} == {(200, None)}


def test_too_little_is_noted_by_what_is_independent() -> None:
    enough = {"tokens": ENOUGH["tokens"], "sequences": None, "documents": None}
    assert notes({"a": enough, "b": {"tokens": 90, "sequences": 80, "documents": ENOUGH["documents"]}}) == []
    (said,) = notes({"a": enough, "b": {"tokens": 9000, "sequences": 800, "documents": 3}, "c": {**enough, "tokens": 10}})
    assert "9,000 tokens of 3 documents for b; 10 rows for c" in said
