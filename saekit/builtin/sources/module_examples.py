"""What a row of a batch looks like: as the user's function says, or as what went into the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from saekit.builtin.sources.batches import Part, arguments, is_texts, part_of, rows_of
from saekit.builtin.sources.users_code import MadeBy, called
from saekit.errors import OptionError
from saekit.examples import Example, Image, Items, Numbers, Text, Tokens, as_example


class Shower:
    """Examples of the rows of batches.

    args: which items of a batch the module is given. caption: an item or a function of a batch. function: what shows a row, if
    the user says; otherwise it is shown by the module's first argument. data: what the batches' function is called.
    """

    def __init__(
        self, args: list[int | str] | None, caption: Part | MadeBy | None, function: Callable[..., Any] | None, data: str
    ) -> None:
        self._args, self._caption, self._function, self._data = args, caption, function, data

    def check(self, batch: Any, n: int) -> None:
        """Show the first row of a batch of `n`. OptionError if it cannot be, or if captions are not as many as rows."""
        self._captions(batch, n)
        self.example(batch, 0, None)

    def example(self, batch: Any, row: int, position: int | None) -> Example:
        """What a row looks like. position: which of its positions the activation belongs to; None if to all of them."""
        caption = ""
        if self._caption is not None:
            told = self._captions(batch, None)[row]
            caption = "" if told is None else str(told)
        shown = self._by_function(batch, row, caption) if self._function else self._by_input(batch, row, position, caption)
        if isinstance(shown, Tokens) and shown.at is None and position is not None and position < len(shown.parts):
            return replace(shown, at=position)
        return shown

    def _captions(self, batch: Any, n: int | None) -> list[Any]:
        if self._caption is None:
            return []
        found = part_of(batch, self._caption, "caption", self._data)
        if isinstance(found, str):
            raise OptionError("caption", f"{self._data} gives one text. Give a list with one for each row.")
        return rows_of(found, len(found) if n is None else n, "caption", f"{self._caption!r} of {self._data}")

    def _by_function(self, batch: Any, row: int, caption: str) -> Example:
        given = called(self._function, "example", self._function, batch, row)
        try:
            return as_example(given, caption)
        except (TypeError, ValueError) as error:
            raise OptionError("example", f"it gives {type(given).__name__} for row {row} of a batch: {error}") from None

    def _by_input(self, batch: Any, row: int, position: int | None, caption: str) -> Example:
        """The row of the module's first argument: a picture, a text, items or numbers."""
        args, kwargs = arguments(batch, self._args, self._data)
        first: Any = next(iter([*args, *kwargs.values()]), None)
        if isinstance(first, Mapping) or not isinstance(first, Tensor | list | tuple) or row >= len(first):
            return Text(text=f"row {row} of its batch", caption=caption)
        value = first[row]
        if isinstance(value, str):
            return Text(text=value, caption=caption)
        if isinstance(value, list) and is_texts(value):
            return Items(parts=value, caption=caption)
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[0] in (1, 3):
            return Image.of(value, caption)
        if isinstance(value, Tensor):
            at_position = position is not None and value.ndim and position < len(value)
            return Numbers.of(value[position] if at_position else value, caption)
        return Text(text=str(value)[:200], caption=caption)
