"""Running out of memory: how it is told from other errors, and work that is halved until it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "storage size calculation overflowed")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` says that a device, or the machine, has too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On a CPU torch raises a RuntimeError with the words of its allocator.
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def in_parts_that_fit(run: Callable[[Sequence[Item]], Found], items: Sequence[Item]) -> Iterator[Found]:
    """`run(items)`; if memory runs out, `run` of each half instead, and so on. What was found of each part, in order.

    A single item that does not fit raises the error, and so does anything but a lack of memory."""
    try:
        found = run(items)
    except Exception as error:
        if len(items) < 2 or not is_out_of_memory(error):
            raise
    else:
        yield found
        return
    # Outside the handler, where the error would keep the tensors of the whole alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for half in (items[: len(items) // 2], items[len(items) // 2 :]):
        yield from in_parts_that_fit(run, half)
