"""The errors of saekit, each with its exit code. A message says what was wrong, where it came from, and how to fix it."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """The exit codes of `saekit`, stable for scripts."""

    OK = 0
    RUN_FAILED = 1
    USAGE = 2
    PLUGIN_FAILED = 3
    HUNG_UP = 129
    INTERRUPTED = 130
    TERMINATED = 143


class SaekitError(Exception):
    """An error with a message for the user; the command line prints it without a traceback.

    summary: the content of `summary.json` if the run was carried out all the same; None if it was not.
    """

    exit_code: ExitCode = ExitCode.RUN_FAILED
    summary: dict[str, Any] | None = None


class UsageError(SaekitError):
    """A configuration, a file or a name that cannot be used; nothing was started."""

    exit_code = ExitCode.USAGE


class ComponentError(UsageError):
    """A component that cannot work with the SAE, the model or the source it was given.

    It does not say who raised it. In a run, the component's key in the run file is put before it:
    `ComponentError("the SAE is a transcoder.")` becomes `analyzer.steer: the SAE is a transcoder.`
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def under(self, key: str) -> UsageError:
        """The error as a run tells it: with the component's key."""
        return UsageError(f"{key}: {self.message}")

    def within(self, option: str) -> OptionError:
        """The error of a component that another one was given as its `option`."""
        return OptionError(option, self.message)


class OptionError(ComponentError):
    """A component that refuses one of its options.

    It names only the option: `OptionError("prompts", "there is no such file.")` reads `prompts: there is no such file.`
    In a run the component's key is put before it: `analyzer.steer.prompts: there is no such file.`
    """

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.args = (f"{option}: {message}",)
        self.option = option

    def under(self, key: str) -> UsageError:
        """The error as a run tells it: with the component's key."""
        return UsageError(f"{key}.{self.option}: {self.message}")

    def within(self, option: str) -> OptionError:
        """The error of a component that another one was given as its `option`."""
        return OptionError(f"{option}.{self.option}", self.message)


class RunError(SaekitError):
    """A run that could not continue; what it had saved is kept."""

    exit_code = ExitCode.RUN_FAILED


class PluginError(SaekitError):
    """A plugin that failed to load, or a component of it that raised in a run."""

    exit_code = ExitCode.PLUGIN_FAILED


class Interrupted(SaekitError):
    """A signal ended the run, by default that of Ctrl-C; the run directory named in the message can be resumed.

    Its exit code is that of a process that the signal ended: 128 more than the signal's number."""

    def __init__(self, message: str, signal: int = ExitCode.INTERRUPTED - 128) -> None:
        super().__init__(message)
        self.exit_code = ExitCode(128 + signal)


@contextlib.contextmanager
def under_key(key: str) -> Iterator[None]:
    """Put `key`, a component's key in the run file, before the errors that it raises in the block."""
    try:
        yield
    except ComponentError as error:
        raise error.under(key) from error


def near_names(wrong: str, known: Iterable[str], how_many: int = 3) -> str:
    """A hint such as ` Did you mean 'topk'?`, or an empty string if no known name is close."""
    near = difflib.get_close_matches(wrong, list(known), n=how_many, cutoff=0.55)
    if not near:
        return ""
    return " Did you mean " + " or ".join(repr(name) for name in near) + "?"
