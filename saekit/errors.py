"""What can go wrong, each with its exit code. Every message names what was wrong, where it came from, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of `saekit`, stable for scripts."""

    OK = 0
    RUN_FAILED = 1
    USAGE = 2
    PLUGIN_FAILED = 3
    INTERRUPTED = 130


class SaekitError(Exception):
    """A mistake or a failure with a message meant for the user; the command line prints it without a traceback."""

    exit_code: ExitCode = ExitCode.RUN_FAILED


class UsageError(SaekitError):
    """A configuration, a file or a name that cannot be used as it stands; nothing was started."""

    exit_code = ExitCode.USAGE


class RunError(SaekitError):
    """A run that could not go on; what it had saved is kept."""

    exit_code = ExitCode.RUN_FAILED


class PluginError(SaekitError):
    """A plugin that failed to load, or a component of it that raised in a run."""

    exit_code = ExitCode.PLUGIN_FAILED


class Interrupted(SaekitError):
    """The user pressed Ctrl-C; the run directory named in the message can be resumed."""

    exit_code = ExitCode.INTERRUPTED


def near_names(wrong: str, known: Iterable[str], how_many: int = 3) -> str:
    """A hint such as ` Did you mean 'topk'?`, or an empty string where nothing is near."""
    near = difflib.get_close_matches(wrong, list(known), n=how_many, cutoff=0.55)
    if not near:
        return ""
    return " Did you mean " + " or ".join(repr(name) for name in near) + "?"
