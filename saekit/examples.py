"""What an example looks like: data that a source gives for one of its rows, with one form as JSON, as HTML and as plain text."""

from __future__ import annotations

import base64
import binascii
import html
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from saekit.wording import clean, is_number, number

if TYPE_CHECKING:
    from torch import Tensor

MOST_NUMBERS, MOST_PIXELS = 64, 96
"""How many numbers of a tensor are kept, and the longest side of an image."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a source as its reader should see it: `Tokens`, `Items`, `Numbers`, `Image` or `Text`.

    caption: what is known of it beside that, such as a label; empty if nothing is.
    """

    kind: ClassVar[str]
    caption: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, with `kind`; `example_of` reads them."""
        plain = {name: value for name, value in asdict(self).items() if value is not None}
        if not self.caption:
            del plain["caption"]
        return {"kind": self.kind, **plain}


@dataclass(frozen=True, kw_only=True)
class Tokens(Example):
    """Parts of a whole in their order, such as the tokens of a text.

    parts: their text. at: the one that the activation belongs to; None if it belongs to all of them.
    activations: of one latent at each part, None where there is none; None if they are not known.
    """

    kind = "tokens"
    parts: Sequence[str]
    at: int | None = None
    activations: Sequence[float | None] | None = None

    def around(self, window: int) -> Tokens:
        """The parts up to `window` places from `at`."""
        if self.at is None:
            return self
        cut = slice(max(0, self.at - window), self.at + window + 1)
        known = None if self.activations is None else self.activations[cut]
        return replace(self, parts=self.parts[cut], activations=known, at=self.at - cut.start)


@dataclass(frozen=True, kw_only=True)
class Items(Tokens):
    """The items of a set; the fields are those of `Tokens`."""

    kind = "set"


@dataclass(frozen=True, kw_only=True)
class Numbers(Example):
    """The first numbers of a tensor, row by row. shape: that of the whole tensor."""

    kind = "numbers"
    values: Sequence[float]
    shape: Sequence[int]

    @classmethod
    def of(cls, tensor: Tensor, caption: str = "") -> Numbers:
        """The first 64 numbers of a tensor of any shape, to four digits."""
        flat = tensor.detach().reshape(-1)[:MOST_NUMBERS].double().tolist()
        return cls(values=[float(f"{value:.4g}") for value in flat], shape=list(tensor.shape), caption=caption)


@dataclass(frozen=True, kw_only=True)
class Image(Example):
    """A small picture. png: the file, in base64."""

    kind = "image"
    png: str

    @classmethod
    def of(cls, pixels: Tensor, caption: str = "") -> Image:
        """Pixels [h, w], [1, h, w] or [3, h, w]: bytes as they are, other numbers from their smallest (black) to their largest.

        The longer side is thinned to at most 96 pixels."""
        import torch

        if pixels.ndim == 2:
            pixels = pixels[None]
        if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
            raise ValueError(f"an image is [h, w], [1, h, w] or [3, h, w], not {list(pixels.shape)}.")
        every = math.ceil(max(pixels.shape[1:]) / MOST_PIXELS)
        small = pixels.detach().cpu()[:, ::every, ::every]
        if small.dtype != torch.uint8:
            small = small.double().nan_to_num(0.0, 0.0, 0.0)
            low, high = small.min(), small.max()
            small = ((small - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)
        return cls(png=_png(small.permute(1, 2, 0).contiguous().numpy()), caption=caption)


@dataclass(frozen=True, kw_only=True)
class Text(Example):
    """Anything that is said in words."""

    kind = "text"
    text: str


KINDS: dict[str, type[Example]] = {made.kind: made for made in (Tokens, Items, Numbers, Image, Text)}


def as_example(value: Any, caption: str = "") -> Example:
    """What a function of the user's gives for a row, as an example: an `Example`, a text, a list or set of items, a tensor.

    A tensor [3, h, w] is an image, any other one numbers. TypeError for anything else."""
    if isinstance(value, Example):
        return replace(value, caption=caption) if caption else value
    if isinstance(value, str):
        return Text(text=value, caption=caption)
    if hasattr(value, "detach"):  # a tensor, without importing torch
        is_image = value.ndim == 3 and value.shape[0] == 3
        return Image.of(value, caption) if is_image else Numbers.of(value, caption)
    if isinstance(value, Iterable) and not isinstance(value, Mapping | bytes):
        items = [str(item) for item in value]
        return Items(parts=sorted(items) if isinstance(value, set | frozenset) else items, caption=caption)
    raise TypeError(f"an example is a text, a list or set of items, a tensor or a saekit.Example, not {type(value).__name__}.")


def example_of(plain: Any) -> Example:
    """The example in what `to_json` gave. ValueError if it is none."""
    try:
        made = KINDS[plain["kind"]](**{name: value for name, value in plain.items() if name != "kind"})
    except (TypeError, KeyError, AttributeError):
        raise ValueError("this is not an example.") from None
    _check(made)
    return made


def as_text(example: Example) -> str:
    """One line for the terminal: the place of the activation is in 【 】, the items of a set are between commas."""
    shown = _plain(example)
    return clean(f"{shown} ({example.caption})" if example.caption else shown)


def as_html(example: Example, strongest: float = 0.0) -> str:
    """The example as an element of a page, with everything in it escaped; `report.css` has its classes.

    strongest: the activation that is highlighted in full; by default the largest one here."""
    shown = _BODIES[type(example)](example, strongest)
    caption = f'<span class="caption">{_escaped(example.caption)}</span>' if example.caption else ""
    return f'<p class="example {example.kind}">{shown}{caption}</p>'


# --- plain text --------------------------------------------------------------------------------------------------


def _plain(example: Example) -> str:
    if isinstance(example, Tokens):
        marked = [f"【{part}】" if place == example.at else part for place, part in enumerate(example.parts)]
        return (", " if isinstance(example, Items) else "").join(marked)
    if isinstance(example, Numbers):
        return " ".join(number(value) for value in example.values) + _rest(example)
    return example.text if isinstance(example, Text) else "a picture"


def _rest(example: Numbers) -> str:
    """What is said of the numbers that are not shown."""
    there = math.prod(example.shape)
    return f" … ({there:,} numbers)" if there > len(example.values) else ""


# --- HTML --------------------------------------------------------------------------------------------------------


def _escaped(text: Any) -> str:
    """Text on one line, with what would not be seen made visible."""
    return html.escape(clean(str(text).replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥")))


def _parts(example: Tokens, strongest: float) -> str:
    known = example.activations if example.activations is not None else [None] * len(example.parts)
    activations = [value if value is not None and is_number(value) else 0.0 for value in known]
    strongest = strongest or max(activations, default=0.0)
    shown = []
    for place, (part, activation) in enumerate(zip(example.parts, activations, strict=True)):
        share = min(max(activation / strongest, 0.0), 1.0) if strongest > 0 else 0.0
        peak = place == example.at
        if share > 0 or peak:
            title = f' title="{number(activation)}"' if share > 0 else ""
            shown.append(f'<mark{" class=peak" if peak else ""} style="--share:{share:.3f}"{title}>{_escaped(part)}</mark>')
        else:
            shown.append(f"<span>{_escaped(part)}</span>")
    return "".join(shown)


def _numbers(example: Numbers, strongest: float) -> str:
    return f"<span>{_escaped(_plain(example))}</span>"


def _text(example: Text, strongest: float) -> str:
    return f"<span>{_escaped(example.text)}</span>"


def _picture(example: Image, strongest: float) -> str:
    return f'<img src="data:image/png;base64,{_escaped(example.png)}" alt="{_escaped(example.caption or "a picture")}">'


_BODIES: dict[type[Example], Any] = {Tokens: _parts, Items: _parts, Numbers: _numbers, Text: _text, Image: _picture}


# --- what is read, and PNG ---------------------------------------------------------------------------------------


def _check(example: Example) -> None:
    """ValueError if a field is not what its class says, so that what is shown was looked at."""
    fine = isinstance(example.caption, str)
    if isinstance(example, Tokens):
        parts, known, at = example.parts, example.activations, example.at
        fine &= isinstance(parts, list) and all(isinstance(part, str) for part in parts)
        fine = fine and (at is None or (isinstance(at, int) and 0 <= at < len(parts)))
        fine = fine and (known is None or (isinstance(known, list) and len(known) == len(parts)))
    elif isinstance(example, Numbers):
        lists = (example.values, example.shape)
        fine &= all(isinstance(of, list) and all(isinstance(n, int | float) for n in of) for of in lists)
    elif isinstance(example, Text):
        fine &= isinstance(example.text, str)
    elif isinstance(example, Image):
        try:
            fine &= base64.b64decode(example.png, validate=True).startswith(b"\x89PNG")
        except (TypeError, ValueError, binascii.Error):
            fine = False
    if not fine:
        raise ValueError(f"this is not an example of the kind {example.kind!r}.")


def _png(pixels: Any) -> str:
    """An array [h, w, 1 or 3] of bytes as a PNG file in base64 (the PNG specification, sections 5 and 11.2)."""
    height, width, channels = pixels.shape
    header = struct.pack(">2I5B", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # each line begins with the number of its filter: none
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")):
        file += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return base64.b64encode(file).decode()
