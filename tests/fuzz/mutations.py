"""Hypothesis strategies that begin with something valid and spoil it: a value, a structure, or the bytes."""

from __future__ import annotations

import copy
import datetime
import json
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = (
    "", " ", "\0", "\x1b[31mred\x1b[0m\x07", "\x9b2J", "\u202egnp.exe", "line\nline", "\r", "..", "../up", "nan", "1e999", "null",
    "a" * 5000, "💥", "e\u0301", "%s{}{0}", "[bold]x[/]", "$HOME", "-1", "--help", "mse", "topk", "a.b.c", "a:b", "os:getcwd", ":",
    "blocks.99.hook_out", "cuda:99", "meta", "ab\u2028cd", "true",
)  # fmt: skip
HALF_PAIRS = ("\ud800", "a\udfffb")
ODD_NUMBERS = (
    0, -1, 1, 2, 3, 7, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 0.0, -0.0, 0.5, 1.0,
    -1.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), True, False,
)  # fmt: skip
KEYS = (
    "use", "name", "weight", "schedule", "to", "steps", "k", "d_sae", "data", "from", "format", "metadata", "shape",
    "dtype", "text", "", "a.b", "\x1b[2J", "x" * 300, "__class__", "0", "data_offsets",
)  # fmt: skip
DATES = (datetime.date(1, 1, 1), datetime.datetime(9999, 12, 31, 23, 59), datetime.time(0, 0))


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def values(*more: Any) -> st.SearchStrategy[Any]:
    """Hostile values, alone and within lists and tables. more: scalars that the format has besides text and numbers."""
    scalars = st.one_of(
        st.sampled_from((*ODD_TEXTS, *more)),
        st.sampled_from(ODD_NUMBERS),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
    )
    scalars = scalars.filter(
        lambda v: HALF_PAIRS[0] in more or not isinstance(v, str) or v.isprintable() or v in ODD_TEXTS
    )
    nested = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
        max_leaves=5,
    )
    return st.one_of(scalars, nested, st.integers(10, 200).map(_nested))


TOML_VALUES = values(*DATES)
JSON_VALUES = values(None, *HALF_PAIRS)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


@st.composite
def spoilt(draw: Callable[..., Any], document: Any, hostile: st.SearchStrategy[Any]) -> Any:
    """A document of tables and lists with one to three of its places spoilt: replaced, removed, repeated, renamed, wrapped,
    swapped with another."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        places = _places(document)
        leaves = [(within, key) for within, key in places if not isinstance(within[key], dict | list)]
        if leaves and draw(st.integers(0, 3)):  # what is checked last is reached only if the rest is whole
            within, key = leaves[draw(st.integers(0, len(leaves) - 1))]
            within[key] = draw(st.sampled_from(ODD_TEXTS if isinstance(within[key], str) else ODD_NUMBERS) | hostile)
            continue
        if not places:
            return draw(hostile)
        container, key = places[draw(st.integers(0, len(places) - 1))]
        change = draw(
            st.sampled_from(("replace", "replace", "replace", "remove", "add", "rename", "wrap", "table", "swap"))
        )
        if change == "replace":
            container[key] = draw(hostile)
        elif change == "remove":
            del container[key]
        elif change == "add" and isinstance(container, list):
            container.append(draw(st.just(container[key]) | hostile))
        elif change == "add":
            container[draw(st.sampled_from(KEYS))] = draw(hostile)
        elif change == "rename" and isinstance(container, dict):
            container[draw(st.sampled_from(KEYS) | st.just(str(key) + "s"))] = container.pop(key)
        elif change == "wrap":
            container[key] = [container[key]]
        elif change == "table":
            container[key] = {draw(st.sampled_from(KEYS)): container[key]}
        elif change == "swap":
            other, its = places[draw(st.integers(0, len(places) - 1))]
            container[key], other[its] = copy.deepcopy(other[its]), copy.deepcopy(container[key])
    return document


PIECES = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\xed\xa0\x80", b"[" * 3000, b'{"a":' * 3000, b"[[[", b"NaN",
    b"1e999", b"9" * 5000, b'"\\ud800"', b"\x1b[2J", b"\n", b",", b"}", b"null", b"\x80\x02c", b"(" * 300,
)  # fmt: skip


@st.composite
def torn(draw: Callable[..., Any], content: bytes) -> bytes:
    """Bytes that are cut short, torn out, repeated, overwritten, or have foreign ones in them."""
    for _ in range(draw(st.integers(1, 3))):
        at, to = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        change = draw(st.sampled_from(("cut", "tear", "repeat", "insert", "overwrite", "only")))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=12))
        if change == "cut":
            content = content[:at]
        elif change == "tear":
            content = content[:at] + content[to:]
        elif change == "repeat":
            content = content[:to] + content[at:]
        elif change == "insert":
            content = content[:at] + piece + content[at:]
        elif change == "overwrite":
            content = content[:at] + piece + content[at + len(piece) :]
        else:
            content = piece
    return content


def spoilt_json(document: Any) -> st.SearchStrategy[bytes]:
    """A JSON file that was spoilt before or after it was written."""
    written = spoilt(document, JSON_VALUES).map(as_json)
    return st.integers(0, 4).flatmap(lambda n: written if n else torn(as_json(document)))


def as_json(document: Any) -> bytes:
    """JSON with NaN, infinities and halves of surrogate pairs as Python writes them."""
    return json.dumps(document, default=str).encode()


DTYPES = (
    "F32", "F64", "F16", "BF16", "I64", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F8_E5M2", "U64", "F4", "", "f32", 32, None,
)  # fmt: skip


@st.composite
def spoilt_safetensors(draw: Callable[..., Any], content: bytes) -> bytes:
    """A safetensors file with another header (dtypes, shapes, offsets, names, its length), or torn."""
    if draw(st.integers(0, 3)) == 0:
        return draw(torn(content))
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    change = draw(st.sampled_from(("dtype", "shape", "values", "any", "length", "name")))
    if change == "dtype":
        header[name]["dtype"] = draw(st.sampled_from(DTYPES))
    elif change == "shape":
        header[name]["shape"] = draw(
            st.sampled_from(([], [0], [0, 0], [1], [2**62, 4], [2**31, 2**31], [-1, 4], header[name]["shape"][::-1]))
        )
    elif change == "values":
        first, last = header[name]["data_offsets"]
        odd = draw(
            st.sampled_from((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff", b"\x01\0\0\0", b"\xff\xff\x7f\x7f"))
        )
        body = body[:first] + (odd * (last - first))[: last - first] + body[last:]
    elif change == "name":
        header[draw(st.sampled_from((*ODD_TEXTS, *header)))] = header.pop(name)
    elif change == "any":
        header = draw(spoilt(header, JSON_VALUES))
    written = as_json(header)
    length = (
        len(written)
        if change != "length"
        else draw(st.sampled_from((0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1)))
    )
    return struct.pack("<Q", length) + written + body


@st.composite
def exchanged(draw: Callable[..., Any], program: str, instead: dict[str, tuple[str, ...]]) -> bytes:
    """A program with one or two of its lines exchanged."""
    for line in draw(st.lists(st.sampled_from(sorted(instead)), min_size=1, max_size=2, unique=True)):
        indent = line[: len(line) - len(line.lstrip())]
        program = program.replace(line, indent + draw(st.sampled_from(instead[line])))
    return program.encode()


@st.composite
def spoilt_lines(draw: Callable[..., Any], lines: tuple[str, ...], hostile: tuple[str, ...]) -> bytes:
    """Lines of a program of which some are replaced, removed, moved or joined by hostile ones; at times torn."""
    kept = list(lines)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(kept) - 1))
        indent = kept[at][: len(kept[at]) - len(kept[at].lstrip())]
        line = indent + draw(st.sampled_from(hostile))
        change = draw(st.sampled_from(("insert", "insert", "replace", "remove", "move")))
        if change == "insert":
            kept.insert(at, line)
        elif change == "replace":
            kept[at] = line
        elif change == "remove" and len(kept) > 1:
            kept.pop(at)
        elif change == "move":
            kept.insert(draw(st.integers(0, len(kept) - 1)), kept.pop(at))
    content = ("\n".join(kept) + "\n").encode("utf-8", "surrogatepass")
    return draw(torn(content)) if draw(st.integers(0, 5)) == 0 else content
