"""Strict reading of JSON: what could not be written back unchanged is refused, and a truncated file is reported as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saekit import UsageError

DEEPEST = 200  # deeper nesting can be read but not written


def read_json(path: Path, wanted: str) -> Any:
    """The content of a UTF-8 file, with or without a byte order mark.

    UsageError, with file, line and column, if it is missing, empty, cut off or malformed; if a key occurs twice in
    an object; and for NaN, Infinity and numbers beyond a double. wanted: a sentence about the expected content.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}. Name a JSON file.") from None
    if not text.strip():
        raise UsageError(f"{path}: is empty. {wanted}")
    try:
        document = json.loads(
            text, object_pairs_hook=_without_repeats, parse_constant=_refuse, parse_float=_finite, parse_int=_whole
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        if _cut_off(text.rstrip(), error):
            raise UsageError(
                f"{path}: ends in the middle ({error.msg}, {where}): it looks cut off. Copy it again."
            ) from None
        raise UsageError(f"{path}: is not valid JSON: {error.msg} at {where}. Correct it there.") from None
    except RecursionError:
        raise UsageError(f"{path}: is nested too deeply. {wanted}") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    if _depth(document) > DEEPEST:
        raise UsageError(f"{path}: is nested too deeply. {wanted}")
    return document


def _depth(document: Any) -> int:
    depth, level = 0, [document]
    while level:
        depth += 1
        level = [v for t in level if isinstance(t, dict | list) for v in (t.values() if isinstance(t, dict) else t)]
    return depth


def _cut_off(text: str, error: json.JSONDecodeError) -> bool:
    """Whether the text merely lacks its end: a complete document ends with its closing brace."""
    return not text.endswith("}") or error.pos >= len(text) or error.msg.startswith("Unterminated string")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(
            f"the key {repeated!r} occurs twice in one object, and only one could be kept. Rename or remove one."
        )
    return table


def _refuse(literal: str) -> Any:
    raise ValueError(f"{literal} is not a JSON number. Write null, or leave the key out.")


def _finite(literal: str) -> float:
    value = float(literal)
    if abs(value) == float("inf"):
        raise ValueError(f"the number {literal} is too large for a double. Write it as text.")
    return value


def _whole(literal: str) -> int:
    try:
        return int(literal)
    except ValueError:  # Python limits the number of digits
        raise ValueError(f"a number of {len(literal)} digits is too long. Write it as text.") from None


def kind_of(value: Any) -> str:
    """The type of a JSON value, in words."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
