"""The source `labelled`: every position and every sequence carries the label of its text, in both streams."""

import itertools
import json

import numpy as np
import pytest
import tomli_w
import torch

import saekit
from saekit.activations.batch import TokenBatch
from saekit.activations.packing import SequenceRows, TokenStore, held_out_order
from saekit.activations.shuffle import ShuffledBatches
from saekit.builtin.sources import LabelledSource
from saekit.errors import UsageError

CPU = torch.device("cpu")
LETTERS = "abcdefghijkl"


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 texts of one letter each. `early`: the letter is in the first half of the twelve; null for k, missing for l.
    `kind`: low, middle, high; `rare`: true for two texts of a."""
    records = []
    for i in range(60):
        place = i % 12
        record = {
            "text": LETTERS[place] * (5 + 3 * (i // 12)),
            "kind": ("low", "middle", "high")[place // 4],
            "rare": i < 24 and place == 0,
        }
        if place < 10:
            record["early"] = place < 6
        elif place == 10:
            record["early"] = None
        records.append(record)
    return written(tmp_path_factory.mktemp("labelled") / "texts.jsonl", records)


def opened(model, data, **options):
    options = {
        "hook_point": "blocks.1.hook_out",
        "context": 16,
        "rows": 4,
        "held_out": 0.25,
        "labels": ["early"],
    } | options
    source = LabelledSource(model=str(model), data=str(data), **options)
    source.open(device=CPU, dtype=torch.float32)
    return source


@pytest.fixture(scope="module")
def source(tiny_llama, data):
    return opened(tiny_llama, data)


def letters(source, tokens):
    """The letter that a text's tokens are made of: [n] ids -> [n] letters; BOS gives none."""
    strings = source.token_strings(tokens)
    assert all(len(set(text)) == 1 or text == "<s>" for text in strings)
    return [None if text == "<s>" else text[0] for text in strings]


def expected(letter, concept):
    place = LETTERS.index(letter)
    if concept == "early":
        return np.nan if place > 9 else float(place < 6)
    return float(("low", "middle", "high")[place // 4] == concept)


def blocks(source, split, n=None, size=100, **options):
    return list(itertools.islice(source.blocks(split, size=size, seed=options.pop("seed", 0), **options), n))


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("balance", [False, True])
def test_each_position_has_the_labels_of_its_text(tiny_llama, data, split, balance):
    source = opened(tiny_llama, data, classes="kind", balance=balance)
    assert source.concepts == ["early", "high", "low", "middle"]
    seen = set()
    for block in blocks(source, split, 12):
        assert block.labels.dtype == torch.float32 and block.labels.shape == (len(block), 4)
        for letter, row in zip(letters(source, block.tokens), block.labels.tolist(), strict=True):
            assert row == pytest.approx([expected(letter, c) for c in source.concepts], nan_ok=True)
            seen.add(letter)
    assert "k" in seen or "l" in seen  # what has no label is data too


def test_activations_are_those_of_the_text_alone(source):
    """In whatever company a row went through the model, and however it was cut."""
    block = blocks(source, "train", 1)[0]
    for number in block.sequence.unique().tolist():
        ids, mask = source._splits["train"].take(np.asarray([number]), 0)
        length = int(mask.sum())
        ids = torch.from_numpy(ids)[:, :length]
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        alone = source.subject.activations(TokenBatch(ids, everywhere, everywhere, torch.zeros(1)))[0]
        here = block.sequence == number
        assert block.position[here].tolist() == list(range(1, length))
        torch.testing.assert_close(block.x[here], alone[1:], atol=1e-5, rtol=1e-5)


def test_sequences_are_whole_texts_with_their_labels(source):
    batch = source.sequences("train", 10, 0, 0)
    assert batch.x.shape[:2] == batch.mask.shape == batch.tokens.shape and batch.labels.shape == (10, 1)
    assert batch.mask[:, 1:].any(0).all(), "cut to the longest"
    assert not batch.x[~batch.mask].any()
    whole = torch.ones_like(batch.tokens, dtype=torch.bool)
    whole[:, 1:] = batch.mask[:, 1:]
    activations = source.subject.activations(TokenBatch(batch.tokens, whole, whole, torch.arange(10)))
    torch.testing.assert_close(batch.x[batch.mask], activations[batch.mask], atol=1e-5, rtol=1e-5)
    for tokens, mask, label in zip(batch.tokens, batch.mask, batch.labels, strict=True):
        assert not mask[0]  # BOS, the first position, is left out
        (letter,) = set(letters(source, tokens[mask]))
        assert float(label) == expected(letter, "early")


def test_sequences_are_a_function_of_seed_and_number_and_come_once_a_pass(source, tiny_llama, data):
    count = source.labelled["train"].count
    assert 0 < count < 50  # a sixth of the texts has no label, a quarter is held out
    one_pass = [source.sequences("train", 1, 0, number) for number in range(count)]
    rows, _ = source.labelled["train"].take(np.arange(count), None)
    assert sorted(batch.tokens[0].tolist() for batch in one_pass) == sorted(row[row != 1].tolist() for row in rows)
    again = opened(tiny_llama, data)
    for number in (0, 7, 1000):
        first, second = (s.sequences("train", 6, 4, number) for s in (source, again))
        assert torch.equal(first.x, second.x) and torch.equal(first.labels, second.labels)
    assert not torch.equal(source.sequences("train", 6, 5, 0).tokens, source.sequences("train", 6, 4, 0).tokens)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_sequences_of_a_transcoder_have_their_targets(tiny_llama, data, split):
    """They are what a source reads that has the target's site for its own, and move along with the rest."""
    site = "model.layers.1.mlp.up_proj"
    paired, there, here = (
        opened(tiny_llama, data, **options)
        for options in ({"target_hook_point": site}, {"hook_point": site}, {})
    )
    batch, targets, alone = (s.sequences(split, 4, 3, 1) for s in (paired, there, here))
    assert batch.target.shape == (*batch.mask.shape, paired.d_out) and paired.d_out != paired.d_in
    assert torch.equal(batch.x, alone.x) and torch.equal(batch.target, targets.x) and alone.target is None
    assert not batch.target[~batch.mask].any()
    assert torch.equal(batch.to("cpu").target, batch.target) and alone.to("cpu").target is None
    ended = paired.sequences("held_out", 4, 0, 10_000)
    assert len(ended) == 0 and ended.target.shape[2] == paired.d_out


def test_held_out_sequences_end_and_share_no_text_with_training(source):
    found = []
    for number in itertools.count():
        batch = source.sequences("held_out", 4, 0, number)
        found.append(batch)
        if len(batch) < 4:
            break
    assert sum(map(len, found)) == source.labelled["held_out"].count
    assert len(source.sequences("held_out", 4, 0, len(found))) == 0
    train, held_out = (set(source.labelled[split]._documents.tolist()) for split in ("train", "held_out"))
    assert train and held_out and not train & held_out


def test_balance_takes_every_combination_equally_often(tiny_llama, data):
    # Few texts fall into the held-out share, so that both of the rare ones are trained on.
    plain, balanced = (opened(tiny_llama, data, labels=["rare"], held_out=0.1, balance=b) for b in (False, True))
    for number in range(5):
        batch = balanced.sequences("train", 10, 0, number)
        assert batch.labels.sum() == 5
    shares = [
        float(torch.cat([source.sequences("train", 10, 0, n).labels for n in range(12)]).mean())
        for source in (plain, balanced)
    ]
    assert shares[0] < 0.2 and shares[1] == 0.5
    rows = [torch.cat([b.labels for b in blocks(source, "train", 10)]) for source in (plain, balanced)]
    assert float(rows[0].mean()) < 0.2 and 0.2 < float(rows[1].mean()) < 0.6  # the rare texts are short
    sequences = torch.cat([b.sequence for b in blocks(balanced, "train", 10)])
    rare = balanced._splits["train"].labels(sequences.unique().numpy(), 0)
    assert abs(rare.mean() - 0.5) < 0.02


def test_a_training_stream_restarts_bit_for_bit(source):
    with ShuffledBatches(source, batch_size=32, block_size=100, seed=3, prefetch=1) as stream:
        run = [(next(stream), stream.position) for _ in range(20)]
    with ShuffledBatches(source, batch_size=32, block_size=100, seed=3, position=run[7][1]) as stream:
        for batch, position in run[8:]:
            again = next(stream)
            assert torch.equal(again.x, batch.x) and stream.position == position
            assert torch.equal(again.labels.nan_to_num(7), batch.labels.nan_to_num(7))


def test_both_streams_at_once(source):
    """A background thread harvests positions while sequences are asked for: both as if they were alone."""
    alone = [source.sequences("train", 5, 1, number).x for number in range(30)]
    with ShuffledBatches(source, batch_size=32, block_size=100, seed=1) as stream:
        quiet = [next(stream).x for _ in range(30)]
    with ShuffledBatches(source, batch_size=32, block_size=100, seed=1, prefetch=2) as stream:
        for number in range(30):
            assert torch.equal(next(stream).x, quiet[number])
            assert torch.equal(source.sequences("train", 5, 1, number).x, alone[number])


def test_counts_are_reported(source):
    assert source.identity()["labels"] == {"early": {"0": 20, "1": 30, "unknown": 10}}
    assert [w for w in source.warnings if "'early' is unknown for 10 of 60 texts" in w]


def test_long_texts_are_divided_evenly_and_nothing_is_lost():
    lengths = [3, 9, 10, 0, 25]
    store = TokenStore(
        np.arange(sum(lengths), dtype=np.int32) + 100,
        np.concatenate([[0], np.cumsum(lengths)]),
        np.zeros(5, dtype=np.uint64),
    )
    given = np.arange(5, dtype=np.float32)[:, None]
    for bos in (None, 1):
        rows = SequenceRows(store, np.asarray([0, 1, 3, 4]), context=9 + (bos is not None), bos=bos, pad=0, given=given)
        numbers = np.argsort(held_out_order(rows.count))  # those of the rows in the order of the texts
        ids, mask = rows.take(numbers, None)
        assert mask.sum(1).tolist() == [n + (bos is not None) for n in (3, 9, 8, 8, 9)]
        text = ids[mask & (ids > 1)]
        assert text.tolist() == [*range(100, 112), *range(122, 147)]
        assert rows.labels(numbers, None)[:, 0].tolist() == [0, 1, 4, 4, 4]
        shuffled, _ = rows.take(np.arange(rows.count, 2 * rows.count), 5)
        assert sorted(map(tuple, shuffled)) == sorted(map(tuple, ids)) and not np.array_equal(shuffled, ids)


TEXTS = [{"text": f"text number {i}", "y": i % 2, "c": "ab"[i % 2]} for i in range(20)]


def changed(**changes):
    return [*TEXTS[:3], {**TEXTS[3], **changes}, *TEXTS[4:]]


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        (TEXTS, {"labels": []}, "^labels: is missing"),
        (TEXTS, {"labels": ["z"]}, r"no line of .*texts.jsonl has the key 'z'\..* Keys: 'c', 'text', 'y'"),
        (TEXTS, {"labels": [], "classes": "cc"}, r"has the key 'cc'. Did you mean 'c'"),
        (changed(y="yes"), {}, r"texts.jsonl, line 4: the label 'y' is 'yes'. Write 0, 1, true or false, or null"),
        (changed(y=2), {}, "line 4: the label 'y' is 2"),
        (changed(y=0.5), {}, "line 4: the label 'y' is 0.5"),
        (changed(y=[1]), {}, "line 4: the label 'y' is a list that holds 1. A list holds spans, each"),
        (changed(c=[]), {"labels": [], "classes": "c"}, r"line 4: the class 'c' is \[\]"),
        (
            [{**t, "y": 1} for t in TEXTS],
            {},
            "'y' is 1 in all 20 texts of .* that have it. Add texts for which it is 0",
        ),
        ([{**t, "y": None if t["y"] else 0} for t in TEXTS], {}, "'y' is 0 in all 10 texts"),
        ([{**t, "y": None} for t in TEXTS], {}, "'y' is unknown for every text of .* Add texts"),
        ([{**t, "c": "a"} for t in TEXTS], {"labels": [], "classes": "c"}, "'c' is 'a' wherever it is given"),
        ([{**t, "c": None} for t in TEXTS], {"labels": [], "classes": "c"}, "'c' is never given"),
        (
            [{**t, "c": "y" if t["y"] else "n"} for t in TEXTS],
            {"classes": "c"},
            "the class 'y' has the name of a label",
        ),
        (
            [{**t, "y": int(i == 0)} for i, t in enumerate(TEXTS)],
            {"held_out": 0.99},
            "all 1 texts for which 'y' is 1 fell among the held-out",
        ),
        (changed(text=5), {}, "line 4: 'text' is int, not text"),
        (TEXTS[:1], {}, "'y' is 0 in all 1 texts"),
        ([{"text": "same", "y": i} for i in (0, 1)], {}, "at least two different ones are needed"),
    ],
)
def test_labels_that_cannot_be_used(tiny_llama, tmp_path, records, options, message):
    path = written(tmp_path / "texts.jsonl", records)
    with pytest.raises(UsageError, match=message):
        opened(tiny_llama, path, **{"labels": ["y"], **options})


def test_files_that_cannot_be_used(tiny_llama, tmp_path, text_file):
    for where, message in (
        (text_file, "cannot read a .txt file"),
        (tmp_path / "x.jsonl", "no such file"),
        ("a_name", "no such file"),
    ):
        with pytest.raises(UsageError, match=message):
            LabelledSource(
                model=str(tiny_llama), hook_point="blocks.1.hook_out", data=str(where), labels=["y"], context=16
            ).peek()
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a", "y": 1}\n{"text": \n')
    with pytest.raises(UsageError, match="bad.jsonl, line 2: is not valid JSON"):
        opened(tiny_llama, path, labels=["y"])


def test_a_run_from_a_file(tiny_llama, data, tmp_path):
    """With a loss that uses the labels of rows."""
    (tmp_path / "plugin.py").write_text(
        "from saekit import Component, Step, hookimpl\n"
        "def push(step: Step):\n"
        '    """The first latent follows the label."""\n'
        "    known = ~step.labels[:, 0].isnan()\n"
        "    return (step.code.pre(None)[:, 0][known] - step.labels[known, 0]).square().mean()\n"
        "@hookimpl\ndef saekit_losses():\n    yield Component('push', push, needs=('labels',))\n"
    )
    table = {
        "source": {
            "use": "labelled",
            "model": str(tiny_llama),
            "hook_point": "blocks.1.hook_out",
            "data": str(data),
            "labels": ["early"],
            "context": 16,
            "held_out": 0.25,
        },
        "architecture": {"use": "topk", "d_sae": 64, "k": 4},
        "loss": [{"use": "mse"}, {"use": "push"}],
        "training": {"tokens": 640, "batch_size": 64, "buffer": 512, "device": "cpu"},
        "evaluation": {"tokens": 300},
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    summary = saekit.run(path, plugins=[tmp_path / "plugin.py"], directory=tmp_path / "run").summary
    assert set(summary["losses"]) == {"mse", "push"}
    assert any("is unknown for 10 of 60 texts" in warning for warning in summary["warnings"])
