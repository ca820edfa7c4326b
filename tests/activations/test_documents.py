"""Documents come out whole, and every kind of bad input is a UsageError that says what, where and how to mend it."""

import json
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saekit.activations.documents import find_files, held_out_documents, read_documents, text_hash
from saekit.errors import UsageError


def texts(data, **options):
    return [document.text for document in read_documents(str(data), **options)]


def test_the_same_texts_from_every_format(tmp_path, text_file, jsonl_file):
    expected = texts(text_file)
    assert len(expected) == 48 and texts(jsonl_file) == expected
    pq.write_table(pa.table({"body": expected}), tmp_path / "t.parquet")
    assert texts(tmp_path / "t.parquet", column="body") == expected


def test_units_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n \nthree\n", encoding="utf-8")
    assert texts(path) == texts(path, unit="paragraph") == ["one\ntwo", "three"]
    assert texts(path, unit="line") == ["one", "two", "three"]
    assert texts(path, unit="file") == ["one\ntwo\n\n \nthree\n"]
    (tmp_path / "b.txt").write_text("four\n\nfive", encoding="utf-8")
    assert texts(tmp_path) == ["one\ntwo\n\n \nthree\n", "four\n\nfive"]  # several files: a document each
    assert texts(tmp_path / "?.txt", unit="paragraph") == ["one\ntwo", "three", "four", "five"]


def test_ids_are_unique_and_do_not_depend_on_where_the_data_lies(tmp_path):
    ids = []
    for root in (tmp_path / "here", tmp_path / "there"):
        (root / "sub").mkdir(parents=True)
        (root / "a.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n')
        (root / "sub" / "a.jsonl").write_text('{"text": "x"}\n')
        ids.append([document.id for document in read_documents(str(root))])
    assert ids[0] == ids[1] == ["a.jsonl:1", "a.jsonl:3", "sub/a.jsonl:1"]


def test_limit_and_blank_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["a", " \n", "b", "c"]))
    assert texts(path) == ["a", "b", "c"]
    assert texts(path, limit=2) == ["a", "b"]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def a_truncated_parquet(path):
    pq.write_table(pa.table({"text": ["some text"] * 100}), path)
    path.write_bytes(path.read_bytes()[:200])


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt: is empty\. Remove it"),
        ("a.txt", " \n\n ", r"holds no text"),
        ("a.txt", b"abc\xff", r"a\.txt: is not UTF-8 \(byte 3 is 0xff\)\. Save it as UTF-8"),
        ("a.jsonl", "", r"a\.jsonl: is empty"),
        ("a.jsonl", GOOD.encode() + b'{"text": "\xe9"}\n', r"a\.jsonl, line 2: is not UTF-8 \(byte 27 is 0xe9\)"),
        ("a.jsonl", GOOD + '{"text": "cut\n', r"a\.jsonl, line 2: is not valid JSON: .*Write one JSON object a line"),
        ("a.jsonl", GOOD + "[1]\n", r"a\.jsonl, line 2: is list, not an object: \[1\]"),
        (
            "a.jsonl",
            GOOD + '{"txt": "x", "n": 1}\n' + GOOD + '{"n": 2}\n',
            r"a\.jsonl, line 2: has no key 'text' \(2 of 4 lines have none\)\. Its keys: 'txt', 'n'\. Did you mean",
        ),
        ("a.jsonl", GOOD + '{"text": 5}\n', r"a\.jsonl, line 2: 'text' is int, not text: 5\. Set column"),
        ("a.jsonl", GOOD + '{"text": null}\n', r"line 2: 'text' is NoneType, not text"),
        ("a.parquet", b"", r"a\.parquet: is empty"),
        ("a.parquet", b"nonsense" * 9, r"a\.parquet: is truncated or not a parquet file"),
        ("a.parquet", a_truncated_parquet, r"a\.parquet: is truncated or not a parquet file"),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table({"texts": ["x"]}), path),
            r"a\.parquet: has no column 'text'\. Its columns: 'texts'\. Did you mean 'texts'\?",
        ),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table({"text": [1, 2]}), path),
            r"a\.parquet: column 'text' is int64, not text",
        ),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table({"text": ["x", None]}), path),
            r"a\.parquet, row 2: 'text' is null",
        ),
        ("a.csv", "text\nx", r"cannot read a \.csv file\. Give one of \.txt, \.jsonl, \.parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        write(path, content)
    with pytest.raises(UsageError, match=message):
        texts(path)


def test_data_that_is_nowhere(tmp_path, monkeypatch):
    write(tmp_path / "corpus.jsonl", GOOD)
    with pytest.raises(UsageError, match=r"no such file or directory\. Did you mean 'corpus\.jsonl'"):
        find_files(str(tmp_path / "corpsu.jsonl"))
    with pytest.raises(UsageError, match=r"no such file or directory"):
        find_files("missing.txt")
    with pytest.raises(UsageError, match=r"the pattern matches no file"):
        find_files(str(tmp_path / "*.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no file to read"):
        find_files(str(tmp_path / "empty"))
    assert find_files("someone/data") is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"not in the local cache, and HF_HUB_OFFLINE is set"):
        texts("someone/no-such-data")


def test_a_hub_that_cannot_be_reached_or_lacks_the_data(monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def answer(error):
        monkeypatch.setattr(HfApi, "dataset_info", Mock(side_effect=error))

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    answer(ConnectionError("no route"))
    with pytest.raises(UsageError, match=r"cannot be reached \(ConnectionError: no route\)\. Give a file"):
        texts("someone/no-such-data")
    answer(RepositoryNotFoundError("404", response=Mock()))
    with pytest.raises(UsageError, match=r"neither a file nor a data set of the Hugging Face hub"):
        texts("someone/no-such-data")


def test_a_data_set_is_read_through_datasets(monkeypatch):
    import datasets

    asked = {}

    def load(name, subset, *, split, streaming):
        asked.update(name=name, subset=subset, split=split, streaming=streaming)
        return datasets.Dataset.from_dict({"body": ["a", "b", "c"], "n": [1, 2, 3]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("saekit.activations.documents.ask_hub", lambda *asked: None)
    assert texts("some/set", column="body", subset="en", split="test", limit=2) == ["a", "b"]
    assert asked == {"name": "some/set", "subset": "en", "split": "test", "streaming": True}
    with pytest.raises(UsageError, match=r"data set 'some/set': has no column 'bdy'.* Did you mean 'body'"):
        texts("some/set", column="bdy")
    with pytest.raises(UsageError, match=r"row 0: 'n' is int, not text"):
        texts("some/set", column="n")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ValueError("Unknown split")))
    with pytest.raises(UsageError, match=r"split 'tset' cannot be loaded: ValueError: Unknown split"):
        texts("some/set", split="tset")


def hashes(words):
    return np.asarray([text_hash(word) for word in words], dtype=np.uint64)


def test_held_out_is_by_text_stable_and_about_the_fraction():
    words = [f"text {i}" for i in range(4000)]
    chosen = held_out_documents(hashes(words), 0.05, "data")
    assert 0.03 < chosen.mean() < 0.07
    assert (held_out_documents(hashes(words[::-1]), 0.05, "data") == chosen[::-1]).all()
    assert (held_out_documents(hashes(words + ["more"] * 9), 0.05, "data")[:4000] == chosen).all()
    twice = held_out_documents(hashes(words + words), 0.3, "data")
    assert (twice[:4000] == twice[4000:]).all()


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_is_ever_empty(fraction):
    chosen = held_out_documents(hashes(["a", "b", "c", "c"]), fraction, "data")
    assert chosen.any() and not chosen.all()


@pytest.mark.parametrize("words", [[], ["a"], ["a", "a"]])
def test_too_few_documents_to_divide(words):
    with pytest.raises(UsageError, match=r"^data: 'x': \d document\(s\) cannot be divided .*unit = \"paragraph\""):
        held_out_documents(hashes(words), 0.5, "x")
