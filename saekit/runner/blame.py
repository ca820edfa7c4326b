"""Whose an unexpected error is: a plugin's, found in the traceback, a lack of memory, or else saekit's own."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from saekit.errors import PluginError, RunError, SaekitError
from saekit.memory import is_out_of_memory
from saekit.plugins import OWN_DISTRIBUTION

if TYPE_CHECKING:
    from saekit.runner.plan import Part


@contextlib.contextmanager
def explained(parts: list[Part]) -> Iterator[None]:
    """Turn an unexpected error in the block that comes out of a plugin's code into a PluginError that names it.

    An error for which no plugin of the run can be blamed passes unchanged: it is a bug here.
    """
    try:
        yield
    except Exception as error:
        better = _explanation(error, parts)
        if better is None:
            raise
        raise better from error


@contextlib.contextmanager
def of_variant(name: str) -> Iterator[None]:
    """Let an error in the block say which variant it is of; `name` is empty where the run has none."""
    try:
        yield
    except SaekitError as error:
        if name:
            error.args = (f"variant {name!r}: {error}",)
        raise


@contextlib.contextmanager
def blamed_on(part: Part) -> Iterator[None]:
    """An unexpected error inside the block is this component's, wherever it was raised."""
    try:
        yield
    except SaekitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _failure(part, error) from error


def _explanation(error: Exception, parts: list[Part]) -> SaekitError | None:
    if is_out_of_memory(error) or is_out_of_memory(error.__cause__):
        return RunError(
            f"there is not enough memory ({_first_line(error.__cause__ or error)}). Lower training.batch_size, "
            "training.buffer, evaluation.batch_size or architecture.d_sae."
        )
    if isinstance(error, SaekitError):
        return None
    modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    for module in reversed(modules):  # the innermost frame that belongs to a plugin
        for part in parts:
            if part.component.distribution != OWN_DISTRIBUTION and module in _modules(part):
                return _failure(part, error)
    return None


def _failure(part: Part, error: Exception) -> PluginError:
    return PluginError(
        f"{part.component.origin} failed: {type(error).__name__}: {error}. Mend it, or leave {part.label!r} out of the "
        "run; what was saved is kept."
    )


def _modules(part: Part) -> set[str]:
    """The module that a component names, and the one in which its target is written."""
    target = part.component.target
    named = target.partition(":")[0] if isinstance(target, str) else ""
    return {named, getattr(part.component.load(), "__module__", "")} - {""}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
