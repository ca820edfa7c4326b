"""How far the harvest of a block has come, or what a source prepares: it is said between two forwards or steps, and whoever waits
hears it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Heard = Callable[[int, int], object]
_hearer: ContextVar[Heard | None] = ContextVar("harvest", default=None)


@contextlib.contextmanager
def harvest_heard_by(hearer: Heard) -> Iterator[None]:
    """In the block, and in this thread, `hearer` is told (done, total) of the block of activations that is harvested."""
    token = _hearer.set(hearer)
    try:
        yield
    finally:
        _hearer.reset(token)


def tell_harvest(done: int, total: int) -> None:
    """`done` of the `total` activations of a block are there, or so many steps of a preparation are done."""
    hearer = _hearer.get()
    if hearer is not None:
        hearer(done, total)
