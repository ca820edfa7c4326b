"""Documents: texts from files or a Hugging Face data set, one at a time, each with an id; and which are held out."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saekit.activations.hub import ask_hub
from saekit.errors import OptionError, UsageError, near_names
from saekit.files import parse_json

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".txt", ".jsonl", ".parquet")
_CHARACTERS = 60  # of a text or a line shown in an error

TextUnit = Literal["auto", "file", "paragraph", "line"]


@dataclass(frozen=True)
class Document:
    """One text. id: unique and stable, such as `notes.jsonl:12` (a line) or `book.txt#3` (a paragraph)."""

    id: str
    text: str


def read_documents(
    data: str,
    *,
    column: str = "text",
    split: str = "train",
    subset: str | None = None,
    unit: TextUnit = "auto",
    limit: int | None = None,
) -> Iterator[Document]:
    """The documents of `data`, in a fixed order; blank ones are left out. One file's text is in memory at a time.

    data: a `.txt`, `.jsonl` or `.parquet` file, a directory or a glob of those, or the name of a Hugging Face data set.
    column: the key (jsonl) or column (parquet, data set) that holds the text.
    split, subset: of a data set.
    limit: the most documents to read.
    unit: one document of a `.txt` file: the whole `file`, each `line`, or each `paragraph` (separated by blank lines);
        `auto` is `file` if there are several files and `paragraph` if there is one.

    UsageError, with file, line and key, for anything that cannot be read; it may come only when the document is reached.
    """
    files = find_files(data)
    if files is None:
        documents = _read_dataset(data, column, split, subset, limit)
    else:
        if unit == "auto":
            unit = "file" if sum(path.suffix == ".txt" for path in files) > 1 else "paragraph"
        documents = _read_files(files, column, unit)
    return _limited(documents, data, limit)


def find_files(data: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path] | None:
    """The files of these kinds that `data` names, sorted; None if it is the name of a data set.

    UsageError if nothing is there."""
    path = Path(data).expanduser()
    kinds = ", ".join(suffixes)
    if path.is_file():
        if path.suffix not in suffixes:
            raise OptionError("data", f"{data!r}: cannot read a {path.suffix or 'nameless'} file. Give one of {kinds}.")
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in suffixes)
        if not files:
            raise OptionError("data", f"{data!r}: the directory holds no file to read. Put one of {kinds} into it.")
        return files
    if any(character in data for character in "*?["):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if p.endswith(suffixes))
        if not files:
            raise OptionError("data", f"{data!r}: the pattern matches no file ending in {kinds}.")
        return files
    if not data or path.suffix in suffixes or data.startswith((".", "/", "~")) or data.count("/") > 1:
        beside = path.parent if path.parent.is_dir() else Path(".")
        near = near_names(path.name, [p.name for p in beside.iterdir()])
        raise OptionError("data", f"{data!r}: there is no such file or directory.{near}")
    return None


def held_out_documents(hashes: np.ndarray, fraction: float, data: str) -> np.ndarray:
    """Which documents are held out: [D] booleans from the [D] hashes of their texts (see `text_hash`).

    A document is held out if its hash lies in the lowest `fraction` of all possible ones, so that copies of a text
    fall on the same side, and held-out documents stay held out when data is added. If one side would be empty, the
    document with the lowest (highest) hash goes there. OptionError for fewer than two different documents.
    """
    import numpy as np

    if len(np.unique(hashes)) < 2:
        raise OptionError(
            "data",
            f"{data!r}: {len(hashes)} document(s) cannot be divided into training and held-out documents; at least two "
            'different ones are needed. Give more files, or divide a text with unit = "paragraph" or "line".',
        )
    chosen = hashes.astype(np.float64) / 2.0**64 < fraction
    if not chosen.any():
        chosen = hashes == hashes.min()
    elif chosen.all():
        chosen = hashes != hashes.max()
    return chosen


def text_hash(text: str) -> int:
    """64 bits of the sha256 of a text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _limited(documents: Iterator[Document], data: str, limit: int | None) -> Iterator[Document]:
    count = 0
    for document in documents:
        if limit is not None and count >= limit:
            return
        if document.text.strip():
            count += 1
            yield document
    if count == 0:
        raise OptionError("data", f"{data!r}: holds no text. Give data with at least two documents.")


def _read_files(files: list[Path], column: str, unit: TextUnit) -> Iterator[Document]:
    root = Path(os.path.commonpath([path.parent for path in files]))
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            if path.stat().st_size == 0:
                raise UsageError(f"{path}: is empty. Remove it, or put text into it.")
            if path.suffix == ".txt":
                yield from _read_text(path, name, unit)
            elif path.suffix == ".jsonl":
                yield from _read_jsonl(path, name, column)
            else:
                yield from _read_parquet(path, name, column)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _read_text(path: Path, name: str, unit: TextUnit) -> Iterator[Document]:
    text = _decoded(path.read_bytes(), path, 0)
    if unit == "file":
        yield Document(name, text)
    elif unit == "line":
        for number, line in enumerate(text.splitlines(), 1):
            yield Document(f"{name}:{number}", line)
    else:
        lines: list[str] = []
        count = 0
        for line in [*text.splitlines(), ""]:
            if line.strip():
                lines.append(line)
            elif lines:
                count += 1
                yield Document(f"{name}#{count}", "\n".join(lines))
                lines = []


def _read_jsonl(path: Path, name: str, column: str) -> Iterator[Document]:
    for number, record in read_records(path):
        yield Document(f"{name}:{number}", text_of(record, path, number, column))


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file with their line numbers. UsageError, with the line, for anything else."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decoded(raw, path, offset, number)
            offset += len(raw)
            if line.strip():
                yield number, _json(line, path, number)


def _json(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise UsageError(
            f"{path}, line {number}: is not valid JSON: {error}: {_shown(line)}. Write one JSON object a line."
        ) from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}, line {number}: is {type(value).__name__}, not an object: {_shown(line)}.")
    return value


def text_of(record: dict[str, Any], path: Path, number: int, column: str) -> str:
    """The text of an object of a .jsonl file. UsageError if it has none."""
    if column not in record:
        lacking, total = _count_lacking(path, column)
        raise UsageError(
            f"{path}, line {number}: has no key {column!r} ({lacking} of {total} lines have none). "
            f"Its keys: {', '.join(map(repr, record)) or 'none'}.{near_names(column, record)} "
            "Set column to one of them."
        )
    text = record[column]
    if not isinstance(text, str):
        raise UsageError(
            f"{path}, line {number}: {column!r} is {type(text).__name__}, not text: {_shown(repr(text))}. "
            "Set column to a key that holds text."
        )
    return text


def _count_lacking(path: Path, column: str) -> tuple[int, int]:
    """How many lines lack a key, and how many there are; lines that cannot be read count as lacking it."""
    lacking = total = 0
    with path.open("rb") as file:
        for raw in file:
            if not raw.strip():
                continue
            total += 1
            try:
                record = parse_json(raw)
            except ValueError:
                record = None
            lacking += not (isinstance(record, dict) and column in record)
    return lacking, total


def _read_parquet(path: Path, name: str, column: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            field = _text_column(table.schema_arrow, column, str(path))
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is None:
                        raise UsageError(f"{path}, row {number}: {column!r} is null, not text. Remove such rows.")
                    yield Document(f"{name}:{number}", text)
    except (pa.ArrowInvalid, pa.ArrowIOError) as error:
        raise UsageError(f"{path}: is truncated or not a parquet file ({error}). Download or write it again.") from None


def _text_column(schema: Any, column: str, where: str) -> str:
    import pyarrow as pa

    if column not in schema.names:
        raise UsageError(
            f"{where}: has no column {column!r}. Its columns: {', '.join(map(repr, schema.names)) or 'none'}."
            f"{near_names(column, schema.names)} Set column to one of them."
        )
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UsageError(f"{where}: column {column!r} is {kind}, not text. Set column to one that holds text.")
    return column


def _read_dataset(name: str, column: str, split: str, subset: str | None, limit: int | None) -> Iterator[Document]:
    """The rows of a data set: downloaded whole and cached on disk, or streamed if there is a limit."""
    import datasets

    if not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        fix = f"Give a file or a directory ({', '.join(SUFFIXES)}), or a data set of https://huggingface.co/datasets."
        ask_hub("data", name, fix)
    where = f"data set {name!r}" + (f" ({subset})" if subset else "")
    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=limit is not None)
    except Exception as error:  # a wrong split, a missing subset, a script, a network: datasets has no common class
        raise UsageError(
            f"{where}: split {split!r} cannot be loaded: {type(error).__name__}: {error} "
            "Check data, subset and split on the data set's page."
        ) from error
    for number, row in enumerate(rows):
        if column not in row:
            raise UsageError(
                f"{where}: has no column {column!r}. Its columns: {', '.join(map(repr, row))}."
                f"{near_names(column, row)} Set column to one of them."
            )
        if not isinstance(row[column], str):
            raise UsageError(
                f"{where}, row {number}: {column!r} is {type(row[column]).__name__}, not text. "
                "Set column to one that holds text."
            )
        yield Document(f"{name}/{split}:{number}", row[column])


def _decoded(raw: bytes, path: Path, offset: int, line: int | None = None) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place = f"{path}, line {line}" if line else str(path)
        raise UsageError(
            f"{place}: is not UTF-8 (byte {offset + error.start} is 0x{raw[error.start]:02x}). Save it as UTF-8."
        ) from None


def _shown(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "..."
