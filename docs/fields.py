"""A griffe extension: lines such as `name: meaning` in a docstring, which reads well in the code, become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"(?P<names>[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): (?P<meaning>\S.*)")


def as_lists(text: str) -> str:
    """`text` with each line that begins with a field as an item of a list; indented lines after it belong to it.

    >>> print(as_lists("A thing.\\n\\nx: [batch, d_in], what is read.\\ny, z: two more,\\n    and their rest."))
    A thing.
    <BLANKLINE>
    - `x`: [batch, d_in], what is read.
    - `y`, `z`: two more,
        and their rest.
    """
    return "\n".join(_FIELD.sub(_item, line) if _FIELD.fullmatch(line) else line for line in text.split("\n"))


def _item(field: re.Match[str]) -> str:
    return f"- {', '.join(f'`{name}`' for name in field['names'].split(', '))}: {field['meaning']}"


class Fields(griffe.Extension):
    """Applied by mkdocstrings to everything it loads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = as_lists(obj.docstring.value)
