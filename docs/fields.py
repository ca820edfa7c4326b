"""A griffe extension: lines such as `name: meaning` in a docstring, which reads well in the code, become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"(?P<names>[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): (?P<meaning>\S.*)")


def as_lists(text: str) -> str:
    """`text` with each paragraph that begins with a field turned into a list of its fields.

    >>> print(as_lists("A thing.\\n\\nx: [batch, d_in], what is read.\\ny, z: two more,\\nand their rest."))
    A thing.
    <BLANKLINE>
    - `x`: [batch, d_in], what is read.
    - `y`, `z`: two more,
      and their rest.
    """
    return "\n\n".join(_paragraph(part) for part in re.split(r"\n\s*\n", text))


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if not _FIELD.fullmatch(lines[0]):
        return text
    items = []
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field:
            names = ", ".join(f"`{name}`" for name in field["names"].split(", "))
            items.append(f"- {names}: {field['meaning']}")
        else:
            items.append(f"  {line.strip()}")
    return "\n".join(items)


class Fields(griffe.Extension):
    """Applied by mkdocstrings to everything it loads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = as_lists(obj.docstring.value)
