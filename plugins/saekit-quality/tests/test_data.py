"""What is written is read again; what is wrong is refused in one line; parts share no dialogue."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saekit_quality.data import QualityData, from_records, read_jsonl, read_records, split, write_jsonl

from saekit import UsageError

GOOD = {"context": "Hello", "response": "Hi", "votes": {"relevance": [1, 0, None], "fluency": [1, 1, 1]}}
TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)


@st.composite
def judged(draw):
    n, annotators = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    criteria = tuple(draw(st.lists(TEXT, min_size=1, max_size=3, unique=True)))
    shape = (n, annotators, len(criteria))
    size = n * annotators * len(criteria)
    values = draw(st.lists(st.sampled_from([0.0, 1.0, np.nan]), min_size=size, max_size=size))
    known = draw(st.none() | st.lists(st.floats(0, 1), min_size=size, max_size=size))
    return QualityData(
        contexts=tuple(draw(st.lists(TEXT | st.just(""), min_size=n, max_size=n))),
        responses=tuple(draw(st.lists(TEXT.filter(str.strip), min_size=n, max_size=n))),
        dialogues=tuple(draw(st.lists(TEXT, min_size=n, max_size=n))),
        criteria=criteria,
        votes=np.array(values).reshape(shape),
        vote_probabilities=None if known is None else np.array(known).reshape(shape),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=judged())
def test_what_is_written_is_read_again(data, tmp_path):
    write_jsonl(tmp_path / "data.jsonl", data)
    again = read_jsonl(tmp_path / "data.jsonl")
    assert (again.contexts, again.responses, again.dialogues) == (data.contexts, data.responses, data.dialogues)
    assert again.criteria == data.criteria
    np.testing.assert_array_equal(again.votes, data.votes)
    np.testing.assert_array_equal(again.vote_probabilities, data.vote_probabilities)


@settings(max_examples=150, deadline=None)
@given(line=st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["context", "response", "votes", "dialogue", "fluency"]), inner, max_size=4),
    max_leaves=8,
))  # fmt: skip
def test_no_line_brings_about_anything_but_an_error_that_names_it(line):
    told = None
    try:
        from_records(read_records([json.dumps(line)], "file"), "file")
    except UsageError as error:
        told = str(error)
    assert told is None or (told.startswith("file") and "\n" not in told)


def read(*lines):
    return from_records(read_records(map(json.dumps, lines), "f.jsonl"), "f.jsonl")


def test_the_order_of_criteria_may_differ_between_lines_and_the_context_names_the_dialogue():
    turned = {**GOOD, "context": ["Hello", "there"], "votes": dict(reversed(GOOD["votes"].items()))}
    data = read(GOOD, turned, {**GOOD, "dialogue": 7, "further": "kept"})
    np.testing.assert_array_equal(data.votes[0], data.votes[1])
    assert data.dialogues == ("Hello", "Hello\nthere", "7")
    assert data.votes.shape == (3, 3, 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "votes": {"relevance": [1, 2, 0]}}, r"line 2: the vote 2 of annotator 2 on 'relevance' is none. Write 0, 1"),
        ({**GOOD, "votes": {"relevance": [True, 0, 0]}}, r"the vote True of annotator 1"),
        ({**GOOD, "votes": {"relevance": ["1", 0, 0]}}, r"the vote '1' of annotator 1"),
        ({**GOOD, "votes": {"relevance": [float("nan"), 0, 0]}}, r"the vote nan of annotator 1"),
        ({**GOOD, "votes": {"relevance": [1, 1, 1]}}, r"response 2: its criteria differ .* lacks 'fluency'"),
        ({**GOOD, "votes": {**GOOD["votes"], "wit": [1, 1, 1]}}, r"has 'wit'"),
        ({**GOOD, "votes": {"relevance": [1, 1], "fluency": [1, 1]}}, r"votes.relevance has 2 entries, .* has 3"),
        ({**GOOD, "votes": {}}, r"response 2: has no votes"),
        ({"response": "Hi"}, r"response 2: has no votes"),
        ({**GOOD, "response": " \n"}, r"line 2: the response is empty"),
        ({"votes": GOOD["votes"]}, r"line 2: has no response"),
        ([1], r"line 2: is not an object"),
        ({**GOOD, "vote_probabilities": {"relevance": [0.5, 0.5, 1.5]}}, r"vote_probabilities"),
        ({**GOOD, "vote_probabilities": {"relevance": [0.5, 0.5, 0.5]}}, r"needs the same criteria"),
    ],
)
def test_each_wrong_line_is_refused_with_its_place_and_the_fix(line, message):
    with pytest.raises(UsageError, match=message) as caught:
        read(GOOD, line)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="there is no response"):
        read_jsonl(tmp_path / "empty.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_jsonl(tmp_path / "bytes.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"response": ')
    with pytest.raises(UsageError, match="line 1: is not JSON"):
        read_jsonl(tmp_path / "broken.jsonl")


def test_parts_share_no_dialogue_and_follow_the_seed():
    data = read(*({**GOOD, "dialogue": i // 3, "response": str(i)} for i in range(60)))
    parts = split(data, {"train": 0.5, "test": 0.25}, seed=1)
    assert not set(parts["train"].dialogues) & set(parts["test"].dialogues)
    assert [len(part) for part in parts.values()] == [30, 15]
    assert split(data, {"train": 0.5, "test": 0.25}, seed=1)["train"].responses == parts["train"].responses
    assert split(data, {"train": 0.5, "test": 0.25}, seed=2)["train"].responses != parts["train"].responses
    with pytest.raises(UsageError, match="'rest' has no dialogue"):
        split(data, {"train": 0.99, "rest": 0.01})
    with pytest.raises(UsageError, match="at most 1 in total"):
        split(data, {"train": 0.9, "rest": 0.2})


def test_the_summary_counts_what_there_is():
    found = read(GOOD, {**GOOD, "votes": {"relevance": [1, 1, 1], "fluency": [None, 0, 1]}}).summary()
    assert (found["responses"], found["dialogues"], found["annotators"]) == (2, 1, 3)
    assert found["criteria"]["relevance"] == {"yes": 0.8, "missing": 1 / 6, "unanimous": 0.5, "labelled": 1}
    assert found["criteria"]["fluency"]["labelled"] == 1
