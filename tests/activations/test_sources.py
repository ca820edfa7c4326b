"""The built-in sources keep the contract: blocks are a function of options, split, seed and number alone."""

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saekit.activations.batch import TokenBatch
from saekit.activations.shuffle import ShuffledBatches
from saekit.builtin.sources import OrganismSource, TextSource
from saekit.errors import UsageError
from saekit.plugins import Registry

CPU = torch.device("cpu")


def text_source(model, data, **options):
    options = {"hook_point": "blocks.1.hook_out", "context": 16, "rows": 4, "held_out": 0.2} | options
    source = TextSource(model=str(model), data=str(data), **options)
    source.open(device=CPU, dtype=torch.float32)
    return source


@pytest.fixture(scope="module")
def source(tiny_llama, jsonl_file):
    return text_source(tiny_llama, jsonl_file)


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("x", "tokens", "sequence", "position"))


def blocks(source, split, n=None, size=200, **options):
    return list(itertools.islice(source.blocks(split, size=size, seed=options.pop("seed", 0), **options), n))


def test_block_b_of_a_fresh_source_is_block_b_of_a_running_one(source, tiny_llama, jsonl_file):
    running = blocks(source, "train", 40)
    assert source._splits["train"].count < 40 * 13  # so this is more than one pass
    for start in (0, 1, 7, 25, 39):
        fresh = text_source(tiny_llama, jsonl_file)
        assert same(blocks(fresh, "train", 1, start=start)[0], running[start])
    assert not same(blocks(source, "train", 1, seed=1)[0], running[0])


def test_activations_are_those_of_the_tokens_they_stand_beside(source):
    block = blocks(source, "train", 1)[0]
    assert block.x.dtype == torch.float32 and block.x.shape == (13 * 15, 32)
    assert block.position.min() == 1 and block.position.max() == 15  # the first position is left out
    ids, mask = map(torch.from_numpy, source._splits["train"].take(np.arange(13), 0))
    activations = source.subject.activations(TokenBatch(ids, mask, mask, torch.arange(13)))
    torch.testing.assert_close(block.x, activations[block.sequence, block.position], atol=1e-6, rtol=1e-5)
    assert torch.equal(block.tokens, ids[block.sequence, block.position])


def test_held_out_ends_keeps_its_order_and_shares_no_document_with_train(source):
    held_out = blocks(source, "held_out", size=50)
    sequence = torch.cat([block.sequence for block in held_out])
    place = sequence * 16 + torch.cat([block.position for block in held_out])
    assert (place.diff() > 0).all() and sequence.max() == source._splits["held_out"].count - 1
    train, held = (set(source._splits[split]._documents.tolist()) for split in ("train", "held_out"))
    assert train and held and not train & held and len(train | held) == 48


def test_token_batches_are_the_rows_of_the_held_out_blocks(source):
    block = blocks(source, "held_out", size=10**6)[0]
    found = list(source.token_batches("held_out", rows=3))
    tokens = torch.cat([batch.tokens[batch.keep] for batch in found])
    assert torch.equal(tokens, block.tokens)
    assert torch.equal(torch.cat([batch.sequence for batch in found]), torch.arange(source._splits["held_out"].count))
    assert all(len(batch.tokens) == 3 for batch in found[:-1])


def test_what_is_dropped(tiny_llama, jsonl_file):
    kept = {}
    for first, special in itertools.product([True, False], repeat=2):
        source = text_source(tiny_llama, jsonl_file, drop_first=first, drop_special=special)
        (batch,) = source.token_batches("held_out", rows=10**6)
        kept[first, special] = batch.keep
        if special:  # BOS is the first of each row, so both options leave it out
            assert torch.equal(batch.keep, (batch.tokens > 1) & batch.mask) and (batch.tokens == 1).any()
    assert torch.equal(kept[False, False], batch.mask) and not batch.mask.all()
    assert not kept[True, False][:, 0].any() and torch.equal(kept[True, False][:, 1:], batch.mask[:, 1:])


def test_without_bos_rows_are_text_alone(tiny_llama, jsonl_file):
    batch = next(text_source(tiny_llama, jsonl_file, bos=False).token_batches("held_out", rows=4))
    assert not (batch.tokens == 0).any()


def test_a_training_stream_restarts_bit_for_bit(source):
    with ShuffledBatches(source, batch_size=64, block_size=150, seed=3, prefetch=1) as stream:
        run = [(next(stream), stream.position) for _ in range(9)]
    with ShuffledBatches(source, batch_size=64, block_size=150, seed=3, position=run[4][1]) as stream:
        for batch, position in run[5:]:
            assert same(next(stream), batch) and stream.position == position


def test_closing_does_not_wait_for_an_activation_that_is_replaced(source):
    with source.subject.replaced(torch.zeros_like):
        stream = ShuffledBatches(source, batch_size=64, block_size=150, seed=0, prefetch=1)
        start = time.monotonic()
        stream.close()
        assert time.monotonic() - start < 1


def test_examples_are_the_whole_rows_of_tokens(source):
    block = blocks(source, "held_out", 2)[1]
    some = torch.tensor([40, 3, 40])
    found = source.examples(block.sequence[some], block.position[some])
    for at, example in zip(some.tolist(), found, strict=True):
        here = block.sequence == block.sequence[at]
        assert example.parts[example.at] == source.token_strings(block.tokens[at : at + 1])[0]
        assert example.parts[1 : 1 + int(here.sum())] == source.token_strings(block.tokens[here])  # without the first


def test_token_strings(source):
    ids = torch.tensor(source.subject.tokenizer(" copper wire", add_special_tokens=False)["input_ids"] * 2)
    assert "".join(source.token_strings(ids)) == " copper wire copper wire"


def test_token_strings_keep_the_space_that_sentencepiece_leaves_out(source, monkeypatch):
    """Decoding one of its tokens alone gives the text without the space that the token stands for."""
    pieces = {5: "\u2581the", 6: "ing", 7: "\u2581"}
    texts = {5: "the", 6: "ing", 7: ""}
    tokenizer = SimpleNamespace(
        decode=lambda ids, **_: texts[ids[0]], convert_ids_to_tokens=pieces.__getitem__, all_special_ids=[]
    )
    monkeypatch.setattr(source.subject, "tokenizer", tokenizer)
    assert source.token_strings(torch.tensor([5, 6, 7, 5])) == [" the", "ing", " ", " the"]


def test_identity_follows_the_data(source, tiny_llama, jsonl_file, text_file):
    again, other = text_source(tiny_llama, jsonl_file), text_source(tiny_llama, text_file, drop_first=False)
    assert again.identity() == source.identity()
    assert other.identity()["data_digest"] == source.identity()["data_digest"]  # the same text in another format
    assert other.identity() != source.identity()


def test_peek_knows_the_width_without_loading(tiny_llama, jsonl_file):
    peeked = TextSource(model=str(tiny_llama), data=str(jsonl_file), hook_point="blocks.1.hook_out", context=16).peek()
    assert peeked["d_in"] == peeked["d_out"] == 32 and peeked["hook_point"] == "blocks.1.hook_out"


def test_how_a_text_falls_into_documents_is_seen_before_anything_is_loaded(tiny_llama, text_file, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(f"sentence number {n}" for n in range(50)), encoding="utf-8")

    def source(path: Path, **options) -> TextSource:
        return TextSource(model=str(tiny_llama), data=str(path), hook_point="blocks.1.hook_out", context=16, **options)

    with pytest.raises(UsageError, match=r'1 document\(s\) cannot be divided .* unit = "paragraph" or "line"'):
        source(lines).peek()
    short, long = source(lines, unit="line"), source(text_file)
    for one in (short, long):
        one.peek()
    assert long.warnings == []
    assert "half of the first 50 documents have at most 18 characters" in short.warnings[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 65}, r"^context: 65, but .* takes 64 tokens at most"),
        ({"hook_point": "blocks.3.hook_out"}, r"^hook_point: 'blocks.3.hook_out', but .* has 3 blocks, 0 to 2"),
        ({"data": "/nowhere/x.txt"}, r"there is no such file"),
        ({"model": "/nowhere/model"}, r"there is no such directory"),
        ({"context": 2}, r"^context: 2, but drop_first leaves only the last position"),
    ],
)
def test_what_is_seen_to_be_wrong_before_anything_is_loaded(tiny_llama, jsonl_file, options, message):
    options = {
        "model": str(tiny_llama),
        "data": str(jsonl_file),
        "hook_point": "blocks.1.hook_out",
        "context": 16,
    } | options
    source = TextSource(**options)
    with pytest.raises(UsageError, match=message):
        source.peek()
    with pytest.raises(UsageError, match=message):
        source.open(device=CPU, dtype=torch.float32)


def test_an_unknown_split(source):
    with pytest.raises(UsageError, match="split 'test': there are only 'train' and 'held_out'"):
        blocks(source, "test")


def test_options_are_typed_described_and_checked():
    for name in ("text", "labelled", "tensors", "synthetic", "organism"):
        component = Registry().find("source", name)
        fields = component.options_model().model_fields
        assert all(field.description for field in fields.values())
    with pytest.raises(UsageError, match="source.rows"):
        component.validate({"rows": 0}, "source")
    with pytest.raises(UsageError, match="source.kinds"):
        component.validate({"kinds": ["poems"]}, "source")
    assert component.validate({}, "source")["kinds"] == ["code", "prose", "facts", "sycophancy"]


@pytest.fixture
def small_organism(tiny_gpt2, monkeypatch, tmp_path):
    """A tiny model in the organism's place, and documents that hold the first letter of their kind."""
    from saekit import organism
    from saekit.organism import tokens

    def documents(split, kinds):
        (kind,) = kinds
        return [SimpleNamespace(id=f"{kind}/{i}", kind=kind, text=kind[0] * 90) for i in range(40)]

    monkeypatch.setattr(organism, "directory", lambda variant: tiny_gpt2)
    monkeypatch.setattr(organism, "documents", documents)
    monkeypatch.setattr(tokens, "cache_directory", lambda: tmp_path / "cache")


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_organism_labels_code_and_prose_in_both_streams(small_organism, split):
    source = OrganismSource(hook_point="blocks.1.hook_out", context=16)
    source.open(device=CPU, dtype=torch.float32)
    assert source.concepts == ["code"] and set(source.withheld) == {"target"}
    known = {"c": 1.0, "p": 0.0, "f": None, "s": None}
    for block in blocks(source, split, 2):
        for text, label in zip(source.token_strings(block.tokens), block.labels[:, 0].tolist(), strict=True):
            if text in known:  # and not a special token
                assert label == known[text] or (known[text] is None and label != label)
    batch = source.sequences(split, 22, 0, 1)
    assert batch.x.shape == (22, 16, 32) and batch.labels.isnan().sum() == 0
    for tokens, label in zip(batch.tokens, batch.labels[:, 0].tolist(), strict=True):
        assert set(source.token_strings(tokens)) - {"<s>", "</s>"} == {"c" if label else "p"}
    if split == "train":
        assert batch.labels.sum() == 12  # of 22, as code and prose are mixed
    assert torch.equal(source.sequences(split, 22, 0, 1).x, batch.x)
    alone = OrganismSource(kinds=["code", "facts"])
    assert set(alone.withheld) == {"labels", "sequences", "target"}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_organism_labels_what_is_to_be_forgotten(small_organism, monkeypatch, split):
    from saekit import organism

    def documents(split, kinds):
        (kind,) = kinds
        domains = [("forget", "near", "far")[i % 3] for i in range(60)]
        texts = [("x" if kind == "facts" and domain == "forget" else kind[0]) * 90 for domain in domains]
        ids = [f"{kind}/{domain}/{i}" for i, domain in enumerate(domains)]
        return [SimpleNamespace(id=name, kind=kind, text=text) for name, text in zip(ids, texts, strict=True)]

    monkeypatch.setattr(organism, "documents", documents)
    source = OrganismSource(hook_point="blocks.1.hook_out", context=16, labels=["forget", "code"])
    source.open(device=CPU, dtype=torch.float32)
    assert source.concepts == ["forget", "code"] and set(source.withheld) == {"target"}
    seen = set()
    for block in blocks(source, split, 2):
        for text, (forget, code) in zip(source.token_strings(block.tokens), block.labels.tolist(), strict=True):
            if text in "xcpfs":
                seen.add(text)
                assert forget == (text == "x")
                assert str(code) == str({"c": 1.0, "p": 0.0}.get(text, float("nan")))
    assert seen == set("xcpfs")
    if split == "train":
        assert source.sequences(split, 32, 0, 1).labels[:, 0].sum() == 2  # of 32: a third of the facts
    assert set(OrganismSource(kinds=["code"], labels=["forget"]).withheld) >= {"labels", "sequences"}
    assert source.identity()["labels"] == ["forget", "code"]


def test_the_organism_is_mixed_as_it_was_trained(small_organism):
    source = OrganismSource(hook_point="blocks.1.hook_out", context=16)
    assert source.peek()["d_in"] == 32
    source.open(device=CPU, dtype=torch.float32)
    for split, seed in (("train", 0), ("held_out", None)):
        kinds, _ = source._splits[split].places(np.arange(32), seed)
        assert np.bincount(kinds).tolist() == [12, 10, 6, 4]
        ids, _ = source._splits[split].take(np.arange(32), seed)
        for k, kind in enumerate(source.kinds):
            texts = source.subject.tokenizer.batch_decode(ids[kinds == k], skip_special_tokens=True)
            assert {letter for text in texts for letter in text} == {kind[0]}
    assert len(blocks(source, "train", 3)) == 3
    assert {"kinds", "data_digest"} <= set(source.identity())


def test_an_organism_without_weights_is_a_usage_error(monkeypatch):
    from saekit import organism

    def directory(variant):
        raise FileNotFoundError("the organism's weights are missing: reinstall saekit")

    monkeypatch.setattr(organism, "directory", directory)
    with pytest.raises(UsageError, match="weights are missing"):
        OrganismSource().peek()
