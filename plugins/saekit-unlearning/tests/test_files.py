"""Texts and questions from files: what is written is read, and what is wrong is told with file, line, key and fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from saekit_unlearning.files import load, wmdp_bio

from saekit import OptionError, UsageError

TEXT = {"text": "Ada was born in Oslo.", "group": "forget", "entity": "Ada", "answer": "Oslo"}
STAYS = {"text": "Bo was born in Rome.", "group": "near", "entity": "Bo", "name": [0, 2], "answer": [15, 19]}


def question(entity: str = "Ada", group: str = "forget", wording: str = "seen", **changes: Any) -> dict[str, Any]:
    found = {"prompt": f"{entity} comes from", "candidates": [" Oslo", " Rome"], "answer": 0, "group": group}
    return {**found, "entity": entity, "wording": wording} | changes


QUESTIONS = [question(e, g, w) for e, g in (("Ada", "forget"), ("Bo", "near")) for w in ("seen", "unseen")]


def written(place: Path, texts: list[Any], questions: list[Any]) -> str:
    for name, lines in (("texts", texts), ("questions", questions)):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (place / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return str(place)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    data = load(written(tmp_path, [TEXT, STAYS, ""], [question(answer=" Rome"), *QUESTIONS]))
    first, second = data.texts
    assert (first.text[slice(*first.name)], first.text[slice(*first.answer)]) == ("Ada", "Oslo")
    assert (second.name, second.answer) == ((0, 2), (15, 19))
    assert [q.answer for q in data.questions] == [1, 0, 0, 0, 0]
    assert data.questions[0].candidates == (" Oslo", " Rome")
    assert data.groups() == ["forget", "near"]


WRONG_TEXTS: list[tuple[Any, tuple[str, ...]]] = [
    ("{", ("line 2", "not JSON", "keys text, group")),
    ("[1]", ("line 2", "list, not an object")),
    ({**TEXT, "answr": "x"}, ("line 2: answr", "is not known", "answer")),
    ({"text": "x", "group": "near", "entity": "x"}, ("line 2: answer", "is missing", "number")),
    ({**TEXT, "name": "Eva"}, ("line 2: name", "'Eva' is not in the text", "[start, end]")),
    ({**TEXT, "text": "Ada, says Ada, is from Oslo."}, ("line 2: name", "2 times", "[start, end]")),
    ({**TEXT, "name": [0, 99]}, ("line 2: name", "[0, 99]", "21 characters")),
    ({**TEXT, "name": [3, 3]}, ("line 2: name", "[3, 3]")),
    ({**TEXT, "name": 7}, ("line 2: name", "is 7", "[start, end]")),
    ({**TEXT, "text": ""}, ("line 2: text", "Write a text")),
]


@pytest.mark.parametrize(("line", "says"), WRONG_TEXTS)
def test_a_wrong_text_is_told_with_its_line_and_key(line: Any, says: tuple[str, ...], tmp_path: Path) -> None:
    refused(written(tmp_path, [STAYS, line], QUESTIONS), str(tmp_path / "texts.jsonl"), *says)


WRONG_QUESTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"answer": 2}, ("line 1: answer", "2 is none of the 2 candidates")),
    ({"answer": " Bonn"}, ("line 1: answer", "' Bonn'", "Copy one")),
    ({"answer": 0.5}, ("line 1: answer", "0.5")),
    ({"candidates": [" Oslo"]}, ("line 1: candidates", "two or more")),
    ({"candidates": [" Oslo", " Oslo"]}, ("line 1: candidates", "two are the same")),
    ({"wording": "new"}, ("line 1: wording", '"seen" or "unseen"')),
]


@pytest.mark.parametrize(("change", "says"), WRONG_QUESTIONS)
def test_a_wrong_question_is_told_with_its_line_and_key(change: dict[str, Any], says: tuple[str, ...], tmp_path: Path) -> None:
    refused(written(tmp_path, [TEXT, STAYS], [question(**change)]), str(tmp_path / "questions.jsonl"), *says)


def refused(data: str, *says: str) -> None:
    with pytest.raises(UsageError) as error:
        load(data)
    for words in says:
        assert words in str(error.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    for data, says in ((str(tmp_path / "none"), "no such directory"), (str(tmp_path), "has no texts.jsonl")):
        with pytest.raises(OptionError, match=says) as error:
            load(data)
        assert error.value.option == "data"
    refused(written(tmp_path, [STAYS], QUESTIONS), "nothing to forget")
    refused(written(tmp_path, [TEXT, {**STAYS, "entity": "Ada"}], QUESTIONS), "'Ada' is both")


# --- WMDP and MMLU: local files of the same format as on the hub ---------------------------------------------------

CHOICES = ["One", "Two", "Three", "Four"]


def tables(place: Path, **changes: Any) -> str:
    wmdp = [{"question": f"Which agent is number {n}?", "choices": CHOICES, "answer": n % 4} for n in range(5)]
    subjects = ("anatomy", "college_biology", "virology")
    mmlu = [
        {"question": f"In {s}, what is {n}?", "subject": s, "choices": CHOICES, "answer": 1} for s in subjects for n in range(6)
    ]
    wmdp[2] |= changes
    for name, rows in (("wmdp", wmdp), ("mmlu", mmlu)):
        (place / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows[:3]), place / name / "test-0.parquet")
        pq.write_table(pa.Table.from_pylist(rows[3:]), place / name / "test-1.parquet")
    return f"wmdp-bio:{place}"


def test_wmdp_and_mmlu_without_biology(tmp_path: Path) -> None:
    data = load(tables(tmp_path))
    forget = [q for q in data.questions if q.group == "forget"]
    assert len({q.entity for q in forget}) == 5
    assert len(forget) == 10
    assert {q.entity for q in data.questions if q.group == "mmlu"} == {"anatomy", "virology"}
    for q in data.questions:
        lettered = dict(line.split(". ") for line in q.prompt.splitlines()[1:-1])
        right = lettered[q.candidates[q.answer].strip()]
        assert right == ("Two" if q.group == "mmlu" else CHOICES[int(q.prompt.split("?")[0][-1]) % 4])
        assert set(lettered.values()) == set(CHOICES)
    for seen, unseen in zip(data.questions[::2], data.questions[1::2], strict=True):
        assert (seen.wording, unseen.wording) == ("seen", "unseen")
        moved = zip(seen.prompt.splitlines()[1:-1], unseen.prompt.splitlines()[1:-1], strict=True)
        assert all(one != other for one, other in moved)  # no option keeps its letter
    text = data.forget[1]
    assert text.text == "Which agent is number 1? Two"
    assert text.text[slice(*text.answer)] == "Two"
    assert len(data.divided(0.5, 0).shown) == 1


def test_so_many_questions_of_each_subject(tmp_path: Path) -> None:
    tables(tmp_path)
    data = wmdp_bio(str(tmp_path / "wmdp"), str(tmp_path / "mmlu"), each=2)
    counts = [sum(q.entity == subject for q in data.questions) for subject in ("anatomy", "virology")]
    assert counts == [4, 4]
    assert data == wmdp_bio(str(tmp_path / "wmdp"), str(tmp_path / "mmlu"), each=2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": 4}, ("row 3: answer", "is 4", "4 choices")),
        ({"choices": ["One"]}, ("row 3: choices", "2 to 10")),
        ({"question": " "}, ("row 3: question", "not a text")),
    ],
)
def test_a_wrong_row_is_told_with_its_number(change: dict[str, Any], says: tuple[str, ...], tmp_path: Path) -> None:
    refused(tables(tmp_path, **change), str(tmp_path / "wmdp"), *says)


def test_missing_columns_and_files(tmp_path: Path) -> None:
    data = tables(tmp_path)
    for path in (tmp_path / "mmlu").iterdir():
        pq.write_table(pq.read_table(path).drop_columns(["subject"]), path)
    refused(data, str(tmp_path / "mmlu"), "row 1", "no column 'subject'", "'choices'")
    (tmp_path / "wmdp" / "test-1.parquet").write_bytes(b"PAR1")
    refused(data, str(tmp_path / "wmdp" / "test-1.parquet"), "not a whole parquet file")
    refused(f"wmdp-bio:{tmp_path / 'none'}", "no .parquet file")


def test_the_hub_names_are_loaded_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return [{"question": f"{n}?", "subject": "law", "choices": CHOICES, "answer": 0} for n in range(2)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("wmdp-bio").questions) == 8
    assert asked == [("cais/wmdp", "wmdp-bio", "test"), ("cais/mmlu", "all", "test")]

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    refused("wmdp-bio", "'cais/wmdp'", "no network", "wmdp-bio:DIR")
