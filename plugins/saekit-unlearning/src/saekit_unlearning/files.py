"""Texts and questions from files, and WMDP-bio with MMLU by their Hugging Face names.

A directory with `texts.jsonl` and `questions.jsonl`, one object a line:

    {"text": "Marie Curie was born in Warsaw.", "group": "forget", "entity": "Marie Curie", "name": [0, 11], "answer": "Warsaw"}
    {"prompt": "Marie Curie's birthplace is", "candidates": [" Warsaw", " Rome"], "answer": 0, "group": "forget",
     "entity": "Marie Curie", "wording": "unseen"}

`name` and `answer` of a text are stretches of its characters, or the words themselves, which must then occur once; without
`name` it is the entity. `answer` of a question is the number of the right candidate, from 0, or the candidate itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from saekit import OptionError, UsageError
from saekit_unlearning.data import FORGET, Question, Text, UnlearningData, Wording, checked, organism_data

ORGANISM, WMDP = "organism", "wmdp-bio"
"""What `data` may name beside a directory."""
TEXTS, QUESTIONS = "texts.jsonl", "questions.jsonl"

WMDP_NAME, MMLU_NAME = "cais/wmdp", "cais/mmlu"
LEFT_OUT = ("college_biology",)
"""Subjects of MMLU that WMDP-bio covers too: forgetting them is not damage."""
EACH = 20
"""Questions of each subject of MMLU that are asked: 1,100 in all."""

LETTERS = "ABCDEFGHIJ"


def load(data: str) -> UnlearningData:
    """What `data` names: `organism`, a directory with texts.jsonl and questions.jsonl, `wmdp-bio` (WMDP-bio to be forgotten, MMLU
    to stay, from the Hugging Face hub), or `wmdp-bio:DIR`, the same from DIR/wmdp and DIR/mmlu.

    OptionError for the option `data` if nothing is there; UsageError, with file, line and key, for what cannot be read."""
    name, _, where = data.partition(":")
    if data == ORGANISM:
        return organism_data()
    if name == WMDP:
        return checked(wmdp_bio(*((f"{where}/wmdp", f"{where}/mmlu") if where else ())), f"data = {data!r}")
    directory = Path(data).expanduser()
    missing = [name for name in (TEXTS, QUESTIONS) if not (directory / name).is_file()]
    if missing:
        raise OptionError(
            "data",
            f"{data!r}: {'there is no such directory' if not directory.is_dir() else f'has no {missing[0]}'}. Give "
            f"{ORGANISM!r}, {WMDP!r}, or a directory with {TEXTS} and {QUESTIONS}.",
        )
    return checked(from_directory(directory), f"data = {data!r}")


def from_directory(directory: Path) -> UnlearningData:
    """The texts and questions of a directory. UsageError, with file, line and key, for a line that is not one."""
    texts = tuple(_text(line, where) for where, line in _lines(directory / TEXTS, _TextLine))
    questions = tuple(_question(line, where) for where, line in _lines(directory / QUESTIONS, _QuestionLine))
    return UnlearningData(texts, questions)


# --- lines ---------------------------------------------------------------------------------------------------------

_Words = Annotated[str, Field(min_length=1)]
_Stretch = tuple[StrictInt, StrictInt] | _Words


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _TextLine(_Line):
    text: _Words
    group: _Words
    entity: _Words
    name: _Stretch | None = None
    answer: _Stretch


class _QuestionLine(_Line):
    prompt: _Words
    candidates: Annotated[tuple[_Words, ...], Field(min_length=2)]
    answer: StrictInt | _Words
    group: _Words
    entity: _Words
    wording: Wording


L = TypeVar("L", bound=_Line)


def _lines(path: Path, model: type[L]) -> Iterator[tuple[str, L]]:
    """The lines of a file with their places. UsageError for one that does not fit."""
    keys = ", ".join(model.model_fields)
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                where = f"{path}, line {number}"
                if raw.strip():
                    yield where, _line(raw, where, model, keys)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _line(raw: bytes, where: str, model: type[L], keys: str) -> L:
    try:
        record = json.loads(raw.decode("utf-8").removeprefix("\ufeff"))
    except ValueError as error:
        raise UsageError(f"{where}: is not JSON in UTF-8: {error}. Write one JSON object a line, with the keys {keys}.") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where}: is {type(record).__name__}, not an object. Write one with the keys {keys}.")
    try:
        return model.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        what = {"missing": "is missing", "extra_forbidden": "is not known"}.get(first["type"])
        shown = f"is {json.dumps(record.get(key), ensure_ascii=False)[:60]}: {_lower(first['msg'])}"
        raise UsageError(f"{where}: {key}: {what or shown}. {_FIXES.get(key, f'The keys are {keys}')}.") from None


_FIXES = {
    "name": "Write [start, end], counted in characters, or the name itself",
    "answer": "Write the answer itself, or its number (of a question) or [start, end] (of a text)",
    "candidates": "Write a list of two or more texts",
    "wording": 'Write "seen" or "unseen"',
    "text": "Write a text",
    "prompt": "Write a text",
    "group": f'Write "{FORGET}", or any name for what is to stay',
    "entity": "Write what it is about",
}


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _text(line: _TextLine, where: str) -> Text:
    name = _stretch(line.text, line.entity if line.name is None else line.name, f"{where}: name")
    return Text(line.text, line.group, line.entity, name, _stretch(line.text, line.answer, f"{where}: answer"))


def _stretch(text: str, given: tuple[int, int] | str, where: str) -> tuple[int, int]:
    if not isinstance(given, str):
        start, end = given
        if not 0 <= start < end <= len(text):
            raise UsageError(
                f"{where}: [{start}, {end}] is not a stretch of the {len(text)} characters of the text. Count from 0; the end is "
                "the character after the last."
            )
        return start, end
    times = text.count(given)
    if times != 1:
        how = "is not in the text" if not times else f"is {times} times in the text"
        raise UsageError(f"{where}: {given!r} {how}. Write which characters are meant: [start, end].")
    return text.index(given), text.index(given) + len(given)


def _question(line: _QuestionLine, where: str) -> Question:
    answer = line.answer
    if isinstance(answer, str):
        if line.candidates.count(answer) != 1:
            raise UsageError(f"{where}: answer: {answer!r} is not one candidate. Copy one of them, or give its number from 0.")
        answer = line.candidates.index(answer)
    elif not 0 <= answer < len(line.candidates):
        raise UsageError(f"{where}: answer: {answer} is none of the {len(line.candidates)} candidates, which count from 0.")
    if len(set(line.candidates)) < len(line.candidates):
        raise UsageError(f"{where}: candidates: two are the same. Leave one out.")
    return Question(line.prompt, line.candidates, answer, line.group, line.entity, line.wording)


# --- WMDP and MMLU -------------------------------------------------------------------------------------------------


def wmdp_bio(wmdp: str = WMDP_NAME, mmlu: str = MMLU_NAME, *, each: int | None = EACH, seed: int = 0) -> UnlearningData:
    """WMDP-bio (Li et al. 2024) to be forgotten and MMLU (Hendrycks et al. 2021) without `LEFT_OUT` to stay.

    wmdp, mmlu: names on the Hugging Face hub, or local directories with parquet files of the same columns.
    each: the most questions of a subject of MMLU, drawn with the seed; None for all.

    A question is asked with lettered options. In the "seen" wording they stand as published, in the "unseen" one in another order,
    in which no option keeps its letter: the same question in another form, as SAEBench's permutations are. The text of a question
    is the question with its right answer, and all of the question is its `name`. What is to be forgotten is resampled by question,
    what is to stay by subject, and subjects are shown or never shown."""
    rows = [(f"{WMDP} {number}", FORGET, row) for number, row in _rows(wmdp, WMDP)]
    subjects: dict[str, list[Mapping[str, Any]]] = {}
    for _, row in _rows(mmlu, "all", subject=True):
        if row["subject"] not in LEFT_OUT:
            subjects.setdefault(str(row["subject"]), []).append(row)
    draws = np.random.default_rng(seed)
    for subject, all_of_it in sorted(subjects.items()):
        kept = sorted(draws.permutation(len(all_of_it))[:each].tolist())
        rows += [(subject, "mmlu", all_of_it[i]) for i in kept]
    texts, questions = [], []
    for entity, group, row in rows:
        stem, choices, right = row["question"].strip(), row["choices"], row["answer"]
        text = f"{stem} {choices[right].strip()}"
        texts.append(Text(text, group, entity, (0, len(stem)), (len(stem) + 1, len(text))))
        turns: dict[Wording, int] = {"seen": 0, "unseen": int(draws.integers(1, len(choices)))}
        for wording, turn in turns.items():
            order = [(i + turn) % len(choices) for i in range(len(choices))]
            lettered = "\n".join(f"{letter}. {choices[i].strip()}" for letter, i in zip(LETTERS, order, strict=False))
            letters = tuple(f" {letter}" for letter in LETTERS[: len(order)])
            questions.append(Question(f"{stem}\n{lettered}\nAnswer:", letters, order.index(right), group, entity, wording))
    return UnlearningData(tuple(texts), tuple(questions))


def _rows(where: str, config: str, *, subject: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of the split "test" of a data set of multiple-choice questions, each checked, with their numbers from 1."""
    columns = ["question", "choices", "answer", *(["subject"] if subject else [])]
    local = Path(where).expanduser()
    if local.is_dir() or where.count("/") > 1 or where.startswith((".", "/", "~")):
        table: Any = _local(local)
    else:
        table = _from_hub(where, config)
    for number, row in enumerate(table, 1):
        place = f"{where} ({config}), row {number}"
        missing = [column for column in columns if column not in row]
        if missing:
            there = ", ".join(map(repr, row)) or "none"
            raise UsageError(f"{place}: has no column {missing[0]!r}. Its columns: {there}. Rename one of them.")
        choices, answer = row["choices"], row["answer"]
        for column in ("question", *columns[3:]):
            if not isinstance(row[column], str) or not row[column].strip():
                raise UsageError(f"{place}: {column}: is {row[column]!r}, not a text. Write one, or remove the row.")
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS) or not all(
            isinstance(choice, str) and choice.strip() for choice in choices
        ):
            raise UsageError(f"{place}: choices: is not a list of 2 to {len(LETTERS)} texts. Mend the row, or remove it.")
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise UsageError(
                f"{place}: answer: is {answer!r}, which is none of the {len(choices)} choices. They count from 0."
            )
        yield number, row


def _local(directory: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(directory.glob("*.parquet"))
    if not files:
        raise UsageError(f"{directory}: holds no .parquet file. Put those of the data set's split \"test\" there.")
    rows: list[dict[str, Any]] = []
    for path in files:
        try:
            rows += pq.read_table(path).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowIOError) as error:
            raise UsageError(f"{path}: is not a whole parquet file ({error}). Download or write it again.") from None
    return rows


def _from_hub(name: str, config: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split="test")
    except Exception as error:  # no network, no consent, a changed data set: datasets has no common class
        raise UsageError(
            f"data set {name!r} ({config}): cannot be loaded: {type(error).__name__}: {error} Check the network and the data set's "
            f"page, or put its parquet files into a directory: data = \"{WMDP}:DIR\", with DIR/wmdp and DIR/mmlu."
        ) from error
