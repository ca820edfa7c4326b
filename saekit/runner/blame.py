"""Who is to blame for an error in a run: a component (with its key in the run file), too little memory, or saekit."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from saekit.errors import ComponentError, PluginError, RunError, SaekitError, UsageError, under_key
from saekit.out_of_memory import is_out_of_memory
from saekit.registered import OWN_DISTRIBUTION

if TYPE_CHECKING:
    from saekit.runner.plan import Part


@contextlib.contextmanager
def explained(parts: list[Part]) -> Iterator[None]:
    """Find out which of the parts raised an error in the block, by the modules in the traceback.

    An option that a component refuses is named with the component's key. An unexpected error out of a plugin's code
    becomes a PluginError that names the plugin, and so does an attempt to end the process (`sys.exit`). An unexpected error of
    saekit passes unchanged: it is a bug here.
    """
    try:
        yield
    except ComponentError as error:
        part = _part_in_traceback(error, parts, _modules_of_bases)
        if part is None:
            raise
        raise error.under(part.key) from error
    except (Exception, SystemExit) as error:
        better = _explanation(error, parts)
        if better is None:
            raise
        raise better from error


@contextlib.contextmanager
def of_variant(name: str) -> Iterator[None]:
    """Put the variant's name before an error in the block; `name` is empty if the run has no variants."""
    try:
        yield
    except SaekitError as error:
        if name:
            error.args = (f"variant {name!r}: {error}",)
        raise


@contextlib.contextmanager
def blamed_on(part: Part) -> Iterator[None]:
    """Blame this component for an error in the block, wherever it was raised.

    An option that it refuses is named with the component's key; an unexpected error or `sys.exit` becomes a PluginError."""
    try:
        with under_key(part.key):
            yield
    except SaekitError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        raise failure(part, error) from error


def failure(part: Part, error: BaseException) -> PluginError:
    """The error that names a component which raised something unexpected."""
    return PluginError(
        f"{part.component.origin} failed: {type(error).__name__}: {error}. Fix it, or leave {part.label!r} out of the "
        "run; what was saved is kept."
    )


def alone(error: SaekitError) -> SaekitError:
    """The error without what it holds on to: its traceback keeps every tensor of the frames that it passed through."""
    kind = next((kind for kind in (UsageError, PluginError) if isinstance(error, kind)), RunError)
    return kind(str(error))


def _explanation(error: BaseException, parts: list[Part]) -> SaekitError | None:
    if is_out_of_memory(error) or is_out_of_memory(error.__cause__):
        return RunError(
            f"there is not enough memory ({_first_line(error.__cause__ or error)}). Lower training.batch_size, "
            "training.buffer, evaluation.batch_size or architecture.d_sae."
        )
    if isinstance(error, SaekitError):
        return None
    if isinstance(error, Exception):  # saekit itself never leaves: where one of its own components does, it ran a user's code
        parts = [part for part in parts if part.component.distribution != OWN_DISTRIBUTION]
    part = _part_in_traceback(error, parts, _modules)
    return None if part is None else failure(part, error)


def _part_in_traceback(error: BaseException, parts: list[Part], modules_of: Callable[[Part], set[str]]) -> Part | None:
    """The part that the innermost frame belongs to, by its module."""
    modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    known = [(part, modules_of(part)) for part in parts]
    return next((part for module in reversed(modules) for part, own in known if module in own), None)


def _modules(part: Part) -> set[str]:
    """The module that a component names, and the one in which its target is written."""
    target = part.component.target
    named = target.partition(":")[0] if isinstance(target, str) else ""
    return {named, getattr(part.component.load(), "__module__", "")} - {""}


def _modules_of_bases(part: Part) -> set[str]:
    """Those modules, and the ones in which the target's base classes are written."""
    bases = getattr(part.component.load(), "__mro__", ())
    return _modules(part) | {base.__module__ for base in bases}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
