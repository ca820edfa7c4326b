"""Examples: one form as JSON, one as HTML with everything escaped, one as plain text."""

from __future__ import annotations

import base64
import json
import struct
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import Image, Items, Numbers, Text, Tokens, as_example, as_html, as_text, example_of

ATTACK = "<script>alert(1)</script>\"'\x1b[31m"
words = st.lists(st.text(max_size=8), min_size=1, max_size=6)
EXAMPLES = st.one_of(
    st.builds(lambda parts, caption: Tokens(parts=parts, at=len(parts) - 1, activations=[0.5] * len(parts), caption=caption),
              words, st.text(max_size=5)),
    st.builds(lambda parts: Items(parts=parts), words),
    st.builds(lambda text: Text(text=text), st.text(max_size=20)),
    st.builds(lambda values: Numbers(values=values, shape=[len(values)]), st.lists(st.floats(-9, 9), max_size=5)),
    st.builds(lambda n: Image.of(torch.rand(3, n, 2 * n)), st.integers(1, 4)),
)


@given(EXAMPLES)
def test_json_gives_the_same_example_back(example) -> None:
    assert example_of(json.loads(json.dumps(example.to_json()))) == example


@pytest.mark.parametrize(
    "example",
    [Tokens(parts=[ATTACK, "b"], at=0, activations=[1.0, 0.0], caption=ATTACK), Items(parts=[ATTACK]),
     Text(text=ATTACK, caption=ATTACK), Image(png=ATTACK, caption=ATTACK)],
)
def test_hostile_text_is_escaped_in_a_page_and_cleaned_for_a_terminal(example) -> None:
    page, line = as_html(example), as_text(example)
    assert "<script" not in page and "\"'" not in page and "\x1b" not in page + line and "\n" not in line


def test_highlights_are_shares_of_the_strongest() -> None:
    page = as_html(Tokens(parts=["a", "b", "c"], at=1, activations=[1.0, 2.0, None]), strongest=4.0)
    assert "--share:0.250" in page and "class=peak" in page and "--share:0.500" in page and "<span>c</span>" in page
    assert page.count("<mark") == 2


def test_what_a_function_gives_becomes_an_example() -> None:
    assert as_example("a text", "label") == Text(text="a text", caption="label")
    assert as_example({"b", "a"}) == Items(parts=["a", "b"])
    assert as_example(["b", "a"]) == Items(parts=["b", "a"])
    assert as_example(torch.arange(100.0)).shape == [100] and len(as_example(torch.arange(100.0)).values) == 64
    assert as_text(as_example(torch.arange(100.0))).endswith("… (100 numbers)")
    assert as_example(torch.rand(3, 8, 8)).kind == "image" and as_example(torch.rand(4, 8, 8)).kind == "numbers"
    with pytest.raises(TypeError, match="not int"):
        as_example(3)


def test_an_image_is_a_png_of_its_pixels() -> None:
    pixels = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    file = base64.b64decode(Image.of(pixels).png)
    assert struct.unpack(">2I", file[16:24]) == (4, 3)
    length = struct.unpack(">I", file[33:37])[0]
    lines = zlib.decompress(file[41 : 41 + length])
    assert [list(lines[i + 1 : i + 5]) for i in (0, 5, 10)] == pixels.tolist()
    assert struct.unpack(">2I", base64.b64decode(Image.of(torch.rand(3, 500, 100)).png)[16:24]) == (17, 84)  # thinned by 6
    with pytest.raises(ValueError, match="not \\[2, 4, 4\\]"):
        Image.of(torch.rand(2, 4, 4))


@pytest.mark.parametrize(
    "damaged",
    [None, 3, {}, {"kind": "other"}, {"kind": "text"}, {"kind": "text", "text": 3}, {"kind": "text", "text": "a", "more": 1},
     {"kind": "tokens", "parts": ["a"], "at": 1}, {"kind": "tokens", "parts": [1]},
     {"kind": "set", "parts": ["a"], "activations": []}, {"kind": [], "text": "a"},
     {"kind": "image", "png": "x\" onerror=alert(1)"}, {"kind": "numbers", "values": ["a"], "shape": [1]}],
)
def test_what_is_no_example_is_refused(damaged) -> None:
    with pytest.raises(ValueError, match="this is not an example"):
        example_of(damaged)
