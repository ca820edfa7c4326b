"""Writing files that are either whole or absent: under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saekit.errors import RunError, UsageError

TEMPORARY = ".*.tmp"
"""The pattern of the temporary names."""


DEEPEST = 100
"""Lists and tables within one another in a file."""


class DiskFull(RunError):
    """There was no room for the file `path`; earlier files are whole."""

    def __init__(self, path: Path, fix: str = "Free some space and try again.") -> None:
        super().__init__(f"{path}: the disk is full. {fix}")
        self.path = path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path next to `path` to write to. It is renamed to `path` if the block ends without an error.

    A full disk, or any other failure to write, becomes a RunError that names the file. The temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk error inside the block into a RunError about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(path) from error
        raise RunError(f"{path}: cannot be written: {error.strerror or error}.") from error
    except Exception as error:
        # safetensors has its own error for a full disk.
        if "No space left" in str(error):
            raise DiskFull(path) from error
        raise


def flush_to_disk(path: Path) -> None:
    """Force the content of a file or directory to the disk, so that a rename cannot come first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file, indented, with keys in their order; NaN and infinities become null."""
    write_text(path, json.dumps(to_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError for whatever cannot be read or, nested deeper than `DEEPEST`, written again."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if nested_too_deeply(value):
        raise ValueError("it is nested too deeply")
    return value


def nested_too_deeply(value: Any) -> bool:
    """Whether tables and lists stand in one another more than `DEEPEST` deep, so that Python might not come to their end."""
    level = [value]
    for _ in range(DEEPEST):
        level = [v for t in level if isinstance(t, dict | list) for v in (t.values() if isinstance(t, dict) else t)]
        if not level:
            return False
    return True


def to_jsonable(value: Any) -> Any:
    """`value` with everything that JSON lacks replaced: tuples become lists, paths and dates text, tensors and numpy
    arrays and numbers lists and numbers, and floats that are not finite None."""
    if isinstance(value, dict):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(v) for v in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Path | datetime.date | datetime.time):
        return str(value)
    return to_jsonable(value.tolist()) if hasattr(value, "tolist") else value


def given_path(text: Path | str, key: str = "") -> Path:
    """A directory that a user named. UsageError, which begins with `key`, for an empty text: it is not meant as "here"."""
    if text == "":
        raise UsageError(f'{key}the path is empty. Name a directory; the one that you are in is ".".')
    return Path(text)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
