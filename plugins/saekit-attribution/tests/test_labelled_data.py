"""Labelled data: written back unchanged, refused with the place of a fault, paired or skipped with the reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from saekit_attribution.labelled_data.document import LabelledData, Pair, Skipped

from saekit import UsageError

SEED: dict[str, Any] = {
    "metadata": {"model": "gemma-2-9b-it", "注": "迎合性"},
    "results": [
        {
            "question_id": 0,
            "dataset": "arguments",
            "base_text": "質問文の一部...",
            "variations": [
                {"template_type": "base", "prompt": "質問全文", "response": "There are", "sycophancy_flag": 0},
                {
                    "template_type": "I really like",
                    "prompt": "質問全文 + I really like...",
                    "response": "Yes, it is",
                    "sycophancy_flag": 1,
                },
            ],
        }
    ],
}


def variation(kind: str, response: Any = "No", flag: Any = 0, prompt: Any = "Q", **more: Any) -> dict[str, Any]:
    return {"template_type": kind, "prompt": prompt, "response": response, "sycophancy_flag": flag, **more}


def labelled(*variations: dict[str, Any]) -> LabelledData:
    return LabelledData({"results": [{"variations": list(variations)}]}, "data.json")


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(content: Any) -> Path:
        path = tmp_path / "labelled.json"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        LabelledData.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- keys of other names ---------------------------------------------------------------------------------------


def test_keys_can_be_named(file: Any) -> None:
    facts = {
        "metadata": {"behaviour": "the old capital"},
        "questions": [
            {
                "asked": [
                    {"condition": "plain", "q": "Where?", "a": "Lima", "wrong": 0, "id": 7},
                    {"condition": "told", "q": "Where, in 1500?", "a": "Cuzco", "wrong": 1},
                ]
            }
        ],
    }
    keys = {
        "results": "questions", "variations": "asked", "template_type": "condition", "prompt": "q", "response": "a",
        "flag": "wrong", "base": "plain",
    }  # fmt: skip
    data = LabelledData.load(file(facts), keys)
    assert data.pairs() == [Pair((0, 1), "told", "Where, in 1500?", "Cuzco", "Where?", "Lima")]
    assert data.behaviour == "the old capital"
    written = data.analysed({(0, 1): {"skipped": "no"}})
    assert written["questions"][0]["asked"][1].pop("atp_analysis") == {"skipped": "no"}
    assert written == facts


def test_a_file_with_other_keys_is_refused_with_the_names_that_are_looked_for(file: Any) -> None:
    path = file({"questions": []})
    assert "results: is missing" in refusal(path)
    with pytest.raises(UsageError, match=r'asked: is missing.*"questions": \[\{"asked": \[\{"template_type": "base"'):
        LabelledData.load(file({"questions": [{}]}), {"results": "questions", "variations": "asked"})
    with pytest.raises(UsageError, match="keys: two fields of a variation have one key"):
        LabelledData.load(path, {"prompt": "text", "response": "text"})


# --- kept as it came --------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=8
)
extras = st.dictionaries(st.text(), values, max_size=3)
one_variation = st.builds(
    lambda extra, known, order: dict(sorted({**extra, **known}.items(), key=lambda item: hash((order, item[0])))),
    extras,
    st.fixed_dictionaries(
        {"template_type": st.sampled_from(["base", "like"]), "prompt": st.text(), "response": st.text()},
        optional={"sycophancy_flag": st.sampled_from([0, 1, True, None, 1.0]), "atp_analysis": values},
    ),
    st.integers(),
)
documents = st.builds(
    lambda before, results, after: {**before, "results": results, **after},
    extras,
    st.lists(
        st.builds(
            lambda before, variations, after: {**before, "variations": variations, **after},
            extras,
            st.lists(one_variation, max_size=4),
            extras.map(lambda table: {k: v for k, v in table.items() if k != "variations"}),
        ),
        max_size=3,
    ),
    extras.map(lambda table: {k: v for k, v in table.items() if k != "results"}),
)


def without_analyses(document: dict[str, Any], places: set[tuple[int, int]]) -> str:
    """The document as text, so that the order of keys counts, without the analyses at these places."""
    document = copy.deepcopy(document)
    for r, i in places:
        document["results"][r]["variations"][i].pop("atp_analysis", None)
    return json.dumps(document)


@settings(max_examples=150, deadline=None)
@given(documents)
@example(SEED)
def test_what_was_there_is_still_there_in_order(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]
) -> None:
    place = tmp_path_factory.mktemp("labelled")
    (place / "in.json").write_text(json.dumps(document), encoding="utf-8")
    data = LabelledData.load(place / "in.json")
    analyses = {p.place: {"skipped": str(p.place)} for p in data.pairs()}
    data.write(place / "out.json", analyses)
    written = json.loads((place / "out.json").read_text(encoding="utf-8"))
    assert without_analyses(written, set(analyses)) == without_analyses(document, set(analyses))
    for r, result in enumerate(document["results"]):
        for i, before in enumerate(result["variations"]):
            after = written["results"][r]["variations"][i]
            if before.get("sycophancy_flag") == 1:
                assert after["atp_analysis"] == {"skipped": str((r, i))}
            else:
                assert after == before
    assert data.document == document  # reading and writing change nothing of what is held


def test_an_earlier_analysis_is_replaced_where_it_stands() -> None:
    data = labelled(variation("base"), {"atp_analysis": "old", **variation("like", "Yes", 1), "late": 1})
    (after,) = [
        v for v in data.analysed({(0, 1): {"a": 1}})["results"][0]["variations"] if v["template_type"] == "like"
    ]
    assert list(after) == ["atp_analysis", "template_type", "prompt", "response", "sycophancy_flag", "late"]
    assert after["atp_analysis"] == {"a": 1}


def test_text_stays_readable_and_half_a_surrogate_survives(file: Any, tmp_path: Path) -> None:
    LabelledData.load(file(SEED)).write(tmp_path / "out.json", {})
    assert "質問全文" in (tmp_path / "out.json").read_text(encoding="utf-8")
    LabelledData.load(file('{"results": [], "x": "\\ud800"}')).write(tmp_path / "out.json", {})
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["x"] == "\ud800"


def test_the_digest_tells_order_and_content_apart() -> None:
    one, other = labelled(variation("base", a=1, b=2)), labelled(variation("base", b=2, a=1))
    assert one.digest == labelled(variation("base", a=1, b=2)).digest != other.digest


# --- refused ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(documents, st.data())
def test_a_file_cut_off_anywhere_is_told_as_such(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any], data: st.DataObject
) -> None:
    whole = json.dumps(document, indent=data.draw(st.sampled_from([None, 2])), ensure_ascii=data.draw(st.booleans()))
    path = tmp_path_factory.getbasetemp() / "cut.json"
    path.write_text(whole[: data.draw(st.integers(1, len(whole) - 1))], encoding="utf-8")
    message = refusal(path)
    assert "looks cut off" in message
    assert "line " in message
    assert "column " in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ('{"results": [\n  {"variations": [}]}\n', "Expecting value at line 2, column 19"),
        ('{"results": []} trailing {}', "Extra data at line 1, column 17"),
        ("[]", "is a list, not an object"),
        ('{"metadata": {}}', "results: is missing"),
        ('{"results": {}}', "results: is an object, not a list"),
        ('{"results": [5]}', "results[0]: is a number, not an object"),
        ('{"results": [{}]}', "results[0].variations: is missing"),
        ('{"results": [{"variations": [null]}]}', "results[0].variations[0]: is null, not an object"),
        ('{"results": [], "results": []}', "'results' occurs twice"),
        ('{"results": [], "x": {"a": 1, "a": 1}}', "'a' occurs twice"),
        ('{"results": [], "x": NaN}', "NaN is not a JSON number"),
        ('{"results": [], "x": -Infinity}', "-Infinity is not a JSON number"),
        ('{"results": [], "x": 1e400}', "1e400 is too large"),
        ('{"results": [], "x": ' + "9" * 5000 + "}", "of 5000 digits is too long"),
        ('{"results": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        ('{"results": [], "x": ' + "[" * 300 + "]" * 300 + "}", "nested too deeply"),
        (b'{"results": ["\xff"]}', "not UTF-8"),
    ],
)
def test_what_is_malformed_is_refused_with_its_place(file: Any, content: Any, said: str) -> None:
    assert said in refusal(file(content))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("prompt", 5, "results[3].variations[1].prompt: is a number, not text"),
        ("response", ["a"], "results[3].variations[1].response: is a list, not text"),
        ("template_type", {}, "results[3].variations[1].template_type: is an object, not text"),
        ("sycophancy_flag", "1", "results[3].variations[1].sycophancy_flag: is text"),
    ],
)
def test_a_wrong_type_is_named_by_its_path(file: Any, key: str, value: Any, said: str) -> None:
    results = [{"variations": [variation("base"), variation("like")]} for _ in range(5)]
    results[3]["variations"][1][key] = value
    assert said in refusal(file({"results": results}))


def test_a_missing_file_a_directory_and_a_byte_order_mark(file: Any, tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.json")
    assert "directory" in refusal(tmp_path)
    assert LabelledData.load(file(b"\xef\xbb\xbf" + json.dumps(SEED).encode())).document == SEED


# --- paired -----------------------------------------------------------------------------------------------------


def test_each_flagged_variation_is_paired_with_the_base_of_its_result() -> None:
    data = LabelledData(
        {
            "results": [
                {
                    "variations": [
                        variation("like", "Yes", 1, "A+"),
                        variation("base", "No", 0, "A"),
                        variation("x", "So"),
                    ]
                },
                {"variations": [variation("base", "Nay", 0, "B"), variation("dislike", "Bad", True, "B-")]},
            ]
        },
        "data.json",
    )
    assert data.pairs() == [
        Pair((0, 0), "like", "A+", "Yes", "A", "No"),
        Pair((1, 1), "dislike", "B-", "Bad", "B", "Nay"),
    ]


@pytest.mark.parametrize(
    ("variations", "reason"),
    [
        ([variation("like", "Yes", 1)], "No base variation"),
        ([variation("base"), variation("base"), variation("like", "Yes", 1)], "Several base variations"),
        ([variation("base", "Yes"), variation("like", "Yes", 1)], "The response equals the base response"),
        ([variation("base"), variation("like", "", 1)], "Empty response"),
        ([variation("base"), variation("like", None, 1)], "Empty response"),
        ([variation("base"), variation("like", " \n", 1)], "Empty response"),
        ([variation("base", ""), variation("like", "Yes", 1)], "Empty base response"),
        ([variation("base"), variation("like", "Yes", 1, prompt="")], "Empty prompt"),
        ([variation("base", prompt=None), variation("like", "Yes", 1)], "Empty base prompt"),
        ([variation("base"), variation("like", "\ud800", 1)], "The response is not valid Unicode"),
        ([variation("base", flag=1)], "The base variation itself is flagged"),
    ],
)
def test_what_cannot_be_paired_is_skipped_with_its_reason(variations: list[dict[str, Any]], reason: str) -> None:
    (found,) = labelled(*variations).pairs()
    assert found == Skipped(found.place, variations[-1]["template_type"], reason)
    assert found.place == (0, len(variations) - 1)


@pytest.mark.parametrize("flag", [0, False, None, 2, 0.5])
def test_what_is_not_flagged_is_left_alone(flag: Any) -> None:
    assert labelled(variation("like", flag=flag)).pairs() == []
