"""Spans of the source `labelled`: labels of single positions, wherever the tokenizer cuts the text."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.activations.documents import Document
from saekit.activations.packing import TokenStore, tokenise
from saekit.builtin.sources import LabelledSource
from saekit.builtin.sources.spans import SpannedText, marked_tokens
from saekit.errors import OptionError, UsageError

NAMES = ("Zoë", "Ида", "Ōe 😀", "Ada")


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def records():
    """40 texts: half hold one or two names, marked by spans of `name`; each `long` if its number is; 8 say 0 or nothing."""
    found = []
    for i in range(40):
        name = NAMES[i // 2 % 4]
        text = f"Nr {i}: schöner Tag, {name} kam, {name} ging, é." if i % 2 else f"Nr {i}: ein schöner leerer Tag, é."
        spans = [[m.start(), m.end()] for m in re.finditer(re.escape(name), text)] if i % 2 else []
        found.append({"text": text, "name": None if i == 8 else 0 if i in (0, 2) else spans, "even": i // 2 % 2})
    return found


def opened(model, data, **options):
    options = {"labels": ["name", "even"], "context": 64, "held_out": 0.25, "hook_point": "blocks.0.hook_out"} | options
    source = LabelledSource(model=str(model), data=str(data), rows=4, **options)
    source.open(device=torch.device("cpu"), dtype=torch.float32)
    return source


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return written(tmp_path_factory.mktemp("spans") / "texts.jsonl", records())


@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("context", [64, 20])
def test_positions_have_the_label_where_a_span_is_and_nowhere_else(tiny_llama, data, tokens, context):
    """Read back from the tokens themselves: what is marked decodes to the names, byte by byte."""
    source = opened(tiny_llama, data, span_tokens=tokens, context=context)
    rows, wanted = source._splits["train"], set()
    numbers = np.arange(rows.count)
    ids, mask = rows.take(numbers, None)
    labels, decode = rows.position_labels(numbers, None), source.subject.tokenizer.decode
    assert labels.shape == (*ids.shape, 2)
    texts = {record["text"]: record for record in records()}
    for document in np.unique(rows._documents):
        own = rows.documents(numbers)[:, 0] == document  # the rows of one text, in the order of its pieces
        order = np.flatnonzero(own)[np.argsort(rows._starts[rows._rows(numbers[own], None)])]
        inside = [np.flatnonzero(mask[row])[1:] for row in order]  # without BOS
        whole = [int(token) for row, at in zip(order, inside, strict=True) for token in ids[row, at]]
        marks = np.concatenate([labels[row, at, 0] for row, at in zip(order, inside, strict=True)])
        record = texts[decode(whole)]
        wanted.add(str(record["name"]))
        if record["name"] is None:
            assert np.isnan(marks).all()
        else:
            expected = covered(source.subject.tokenizer, record["text"], record["name"] or [], tokens)
            assert marks.tolist() == expected
        assert all((labels[row, at, 1] == record["even"]).all() for row, at in zip(order, inside, strict=True))
    assert {"None", "0", "[]"} & wanted and len(wanted) > 4


def covered(tokenizer, text, spans, tokens):
    """Which tokens of a text share a character with a span, by decoding ever longer beginnings: a slow second opinion."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = [len(bytes_of(tokenizer, ids[: n + 1])) for n in range(len(ids))]  # in bytes
    starts = [0, *ends[:-1]]
    marks = [0.0] * len(ids)
    for start, end in spans:
        first, last = len(text[:start].encode()), len(text[:end].encode())
        # A token of part of a character counts as the whole character.
        wide = [whole(text, *stretch) for stretch in zip(starts, ends, strict=True)]
        inside = [n for n, (begin, stop) in enumerate(wide) if begin < last and stop > first]
        for n in inside if tokens == "all" else inside[-1:]:
            marks[n] = 1.0
    return marks


def bytes_of(tokenizer, ids):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    back = {character: byte for byte, character in bytes_to_unicode().items()}
    return bytes(back[c] for token in tokenizer.convert_ids_to_tokens(ids) for c in token)


def whole(text, start, end):
    """A stretch of bytes widened to whole characters."""
    edges = np.cumsum([0, *(len(c.encode()) for c in text)])
    return int(edges[edges <= start].max()), int(edges[edges >= end].min())


def test_both_streams_give_the_labels_of_positions(tiny_llama, data):
    source = opened(tiny_llama, data, balance=True)
    block = next(source.blocks("train", size=400, seed=0))
    strings = source.token_strings(block.tokens)
    assert {0.0, 1.0} == set(block.labels[:, 0].nan_to_num(0).tolist())
    assert {s for s, y in zip(strings, block.labels[:, 0].tolist(), strict=True) if y == 1}.isdisjoint({" Tag", "N", "r", ":"})
    batch = source.sequences("train", 12, 0, 0)
    assert batch.position_labels.shape == (*batch.mask.shape, 2)
    assert torch.equal(batch.labels_of_positions().nan_to_num(9), batch.position_labels[batch.mask].nan_to_num(9))
    sums = (batch.position_labels[..., 0] == 1).sum(1)
    known = ~batch.labels[:, 0].isnan()
    assert torch.equal(batch.labels[known, 0] == 1, sums[known] > 0) and known.sum() > 6
    moved = batch.to("cpu")
    assert torch.equal(moved.position_labels.nan_to_num(9), batch.position_labels.nan_to_num(9))
    empty = source.sequences("held_out", 4, 0, 10_000)
    assert len(empty) == 0 and empty.labels_of_positions().shape == (0, 2)


def test_what_the_spans_mark_belongs_to_the_identity(tiny_llama, data):
    first, last = (opened(tiny_llama, data, span_tokens=tokens) for tokens in ("all", "last"))
    assert first.identity()["spans"] != last.identity()["spans"] and first.fingerprint() != last.fingerprint()
    assert last.identity()["spans"]["positions"] == {"name": 40, "even": 0}
    assert "spans" not in opened(tiny_llama, data, labels=["even"]).identity()


def test_every_text_may_have_a_span(tiny_llama, tmp_path):
    """The positions beside it are those without the label."""
    path = written(tmp_path / "texts.jsonl", [{"text": f"Nr {i} is here", "name": [[0, 2]]} for i in range(8)])
    batch = opened(tiny_llama, path, labels=["name"]).sequences("train", 4, 0, 0)
    assert batch.labels.eq(1).all() and {0.0, 1.0} == set(batch.labels_of_positions()[:, 0].tolist())


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), drawn=st.data())
def test_any_span_of_any_text_marks_the_tokens_it_shares_a_character_with(tiny_tokenizer, text, drawn):
    start = drawn.draw(st.integers(0, len(text) - 1))
    end = drawn.draw(st.integers(start + 1, len(text)))
    piece = text[start:end]
    inner = (start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())) if piece.strip() else (start, end)
    store = tokenise([Document("a", "before "), Document("b", text)], tiny_tokenizer, eos=False)
    twice = SpannedText("file, line 1", 1, text, {0: [(start, end), (start, end)]})
    marks, _ = marked_tokens([twice], store, ["name"], tiny_tokenizer, "all")
    assert not marks[: store.offsets[1]].any()
    assert marks[store.offsets[1] :, 0].tolist() == covered(tiny_tokenizer, text, [inner], "all")


class Silent:
    """A tokenizer that says nothing of the last character, as some do of control characters."""

    is_fast = True

    def __call__(self, text, **options):
        return {"offset_mapping": [(n, n + 1) for n in range(len(text) - 1)]}


def test_spans_without_a_token_are_told():
    store = TokenStore(np.zeros(6, dtype=np.int32), np.asarray([0, 3, 6]), np.zeros(2, dtype=np.uint64))
    texts = [SpannedText(f"a.jsonl, line {n}", n - 1, "abcd", {0: [(n, n + 1), (3, 4)]}) for n in (1, 2)]
    marks, warnings = marked_tokens(texts, store, ["name"], Silent(), "all")
    assert np.flatnonzero(marks[:, 0]).tolist() == [1, 5]
    assert warnings == [
        "2 span(s) of the label 'name' cover no token and mark nothing; the first is in a.jsonl, line 1, [3, 4]."
    ]
    nothing = [SpannedText("a.jsonl, line 1", 0, "abcd", {0: [(3, 4)]})]
    with pytest.raises(OptionError, match=r"no span of 'name' covers a token: a.jsonl, line 1, \[3, 4\]. Look at"):
        marked_tokens(nothing, store, ["name"], Silent(), "all")
    with pytest.raises(OptionError, match="this model's tokenizer cannot tell where .* Use a model with a fast tokenizer"):
        marked_tokens(texts, store, ["name"], object(), "all")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[3, 80]], r"s.jsonl, line 2: the label 'name' has the span \[3, 80\], but the text has 10 characters. Give the first"),
        ([[-1, 3]], r"line 2: the label 'name' has the span \[-1, 3\]"),
        ([[0, 2], [4, 4]], r"line 2: the label 'name' has the span \[4, 4\]"),
        ([[5, 2]], r"line 2: the label 'name' has the span \[5, 2\]"),
        ([0, 2], "line 2: the label 'name' is a list that holds 0. A list holds spans, each"),
        ([[0, 2, "x"]], r"line 2: the label 'name' is a list that holds \[0, 2, 'x'\]"),
        ([[0.0, 2]], r"is a list that holds \[0.0, 2\]"),
        ([[False, True]], r"is a list that holds \[False, True\]"),
        ({"a": [0, 2]}, r"line 2: the label 'name' is \{'a': \[0, 2\]\}. Write 0, 1, .*a list of spans"),
        ([], "'name' is 0 in all 4 texts"),
    ],
)
def test_spans_that_cannot_be_used(tiny_llama, tmp_path, spans, message):
    lines = [{"text": f"text nr {n} x", "name": spans if n == 1 else 0} for n in range(4)]
    lines[1]["text"] = "text nr 1x"
    with pytest.raises(UsageError, match=message):
        opened(tiny_llama, written(tmp_path / "texts.jsonl", lines), labels=["name"])


def test_a_label_that_no_line_has_is_refused_by_name(tiny_llama, data):
    with pytest.raises(OptionError, match="has the key 'names'. Did you mean 'name'"):
        opened(tiny_llama, data, labels=["names"])
