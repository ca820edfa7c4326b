"""Texts or images with labels and captions, as the source `encoder` reads them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saekit.activations.documents import (
    TextUnit,
    find_files,
    held_out_documents,
    read_documents,
    read_records,
    text_hash,
    text_of,
)
from saekit.activations.packing import held_out_order
from saekit.builtin.sources.labelled import class_of, label_of
from saekit.errors import OptionError, near_names
from saekit.files import sha256_of
from saekit.seeds import derived_seed

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
FOLDER = "folder"


@dataclass
class Records:
    """Records in their order. content: each text, or the path of each image. labels: [D, n_concepts], NaN if unknown.

    held_out: [D], which ones are. captions: empty where there is none. files: where they are from.
    """

    content: list[str]
    labels: np.ndarray
    concepts: list[str]
    captions: list[str]
    held_out: np.ndarray
    files: list[Path]

    def batches(self, split: str, seed: int, rows: int) -> Iterator[np.ndarray]:
        """The numbers of the records of each batch: in training in an order drawn from `seed`, held out always in the same."""
        numbers = np.flatnonzero(self.held_out == (split == "held_out"))
        if split == "held_out":
            numbers = numbers[held_out_order(len(numbers))]
        else:
            numbers = np.random.Generator(np.random.PCG64(derived_seed("records", seed))).permutation(numbers)
        for start in range(0, len(numbers), rows):
            yield numbers[start : start + rows]

    def digests(self) -> dict[str, str]:
        """sha256 of each file, by its name."""
        return {path.name: sha256_of(path) for path in self.files}


def files_of(data: str, images: bool) -> list[Path]:
    """The files that `data` names: lists of records, texts, or pictures. OptionError if there are none."""
    wanted = (".jsonl", *PICTURES) if images else (".txt", ".jsonl")
    files = find_files(data, wanted)
    if files is None:
        raise OptionError("data", f"{data!r}: there is no such file or directory. Name one of {', '.join(wanted)}.")
    lists = [path for path in files if path.suffix == ".jsonl"]
    return lists or files


def read(
    data: str,
    *,
    images: bool,
    column: str,
    labels: list[str],
    classes: str | None,
    caption: str | None,
    unit: TextUnit,
    limit: int | None,
    held_out: float,
) -> Records:
    """Read the records; the arguments are options of the source. UsageError, with file and line, for what cannot be read."""
    files = files_of(data, images)
    found = list(itertools.islice(_records(data, files, images, column, unit), limit))
    content = [one for one, _, _, _ in found]
    _check_keys(data, found, [*labels, *(key for key in (classes, caption) if key is not None)])
    table = [[label_of(record.get(key), key, f"{path}, line {number}") for key in labels] for _, record, path, number in found]
    known = np.asarray(table, dtype=np.float32).reshape(len(found), len(labels))
    concepts = list(labels)
    if classes is not None:
        names = [class_of(record.get(classes), classes, path, number) for _, record, path, number in found]
        every = sorted({name for name in names if name is not None})
        if len(every) < 2:
            raise OptionError("classes", f"{classes!r} has {len(every)} class in {data}. Give at least two classes.")
        of_class = [[np.nan if name is None else float(name == other) for other in every] for name in names]
        known, concepts = np.concatenate([known, np.asarray(of_class, dtype=np.float32)], 1), [*labels, *every]
    captions = [str(record.get(caption) or "") if caption else "" for _, record, _, _ in found]
    hashes = [text_hash(one) if not images else int(sha256_of(Path(one))[:16], 16) for one in content]
    chosen = held_out_documents(np.asarray(hashes, dtype=np.uint64), held_out, data)
    return Records(content, known, concepts, captions, chosen, files if not images or files[0].suffix == ".jsonl" else [])


Found = tuple[str, dict[str, Any], Path, int]


def _records(data: str, files: list[Path], images: bool, column: str, unit: TextUnit) -> Iterator[Found]:
    """(text or path of an image, its record, the file, the line) of each."""
    if files[0].suffix == ".jsonl":
        for path in files:
            for number, record in read_records(path):
                text = text_of(record, path, number, column)
                if images:
                    picture = path.parent / text
                    if not picture.is_file():
                        raise OptionError("data", f"{path}, line {number}: there is no picture {picture}.")
                    yield str(picture), record, path, number
                elif text.strip():
                    yield text, record, path, number
    elif images:
        for path in files:
            yield str(path), {FOLDER: path.parent.name}, path, 1
    else:
        for document in read_documents(data, unit=unit):
            yield document.text, {}, files[0], 1


def _check_keys(data: str, found: list[Found], keys: list[str]) -> None:
    """OptionError for a key that no record has."""
    there = {key for _, record, _, _ in found for key in record}
    for key in keys:
        if key not in there:
            keys_there = ", ".join(map(repr, sorted(there))) or "none"
            raise OptionError("data", f"no record of {data} has the key {key!r}.{near_names(key, there)} Keys: {keys_there}.")
