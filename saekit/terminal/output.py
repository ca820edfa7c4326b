"""The only door to the terminal: what is printed comes from files, names and other people's errors, and must not control it.

Commands print with `echo` and `echo_json`; whatever draws with rich takes its `Console` from here.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any, TextIO

import click

from saekit.wording import UNSAFE, clean_lines

if TYPE_CHECKING:
    from rich.console import Console


def echo(text: Any = "", *, err: bool = False, nl: bool = True, file: TextIO | None = None, **style: Any) -> None:
    """`click.echo` of clean text; style: `fg`, `bold` and others of `click.style`."""
    cleaned = clean_lines(text)
    click.echo(click.style(cleaned, **style) if style else cleaned, err=err, nl=nl, file=file)


def wrapped(text: str, first: str = "", rest: str = "") -> str:
    """The text in lines that fit the terminal, broken only at spaces, and never at a no-break space.

    first, rest: what the first line and the others begin with. A word wider than the terminal has a line of its own."""
    width = max(shutil.get_terminal_size().columns, len(first) + 20)
    lines = textwrap.wrap(
        clean_lines(text), width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines or [first.rstrip()]).replace("\xa0", " ")


def listed(name: str, summary: str, origin: str, indent: str = "") -> str:
    """A component in a list: its name in a column of its own, then what it does, and where it comes from."""
    first = f"{indent}{name:<20} "
    return wrapped(f"{summary} " + f"[{origin}]".replace(" ", "\xa0"), first, " " * len(f"{indent}{'':<20} "))


def echo_json(document: Any) -> None:
    """One JSON document on stdout. What would control a terminal, and half a surrogate pair, is written as JSON's `\\uXXXX`."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    click.echo(re.sub(UNSAFE, lambda found: f"\\u{ord(found[0]):04x}", text))


def console(**options: Any) -> Console:
    """A rich `Console` whose texts are clean; options: those of `Console`. rich's own control codes pass."""
    from rich.console import Console
    from rich.segment import Segment

    class CleanConsole(Console):
        def render(self, renderable: Any, options: Any = None) -> Any:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(clean_lines(segment.text), segment.style)

    return CleanConsole(**options)


def print_what_cannot_be_encoded() -> None:
    """Let stdout and stderr write a character that their encoding lacks as `\\uXXXX`, where Python would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
