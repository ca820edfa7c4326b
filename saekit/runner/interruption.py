"""What ends a run from outside: Ctrl-C (SIGINT), SIGTERM from a cluster or a service manager, SIGHUP when the terminal closes.

In training each of them lets the step end and saves a checkpoint; elsewhere it stops the run at once, and so does Ctrl-C pressed
twice. SIGTERM and SIGHUP often come several times over, so a second one changes nothing.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saekit.errors import Interrupted

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_WORDS = {"SIGTERM": " by SIGTERM", "SIGHUP": " by SIGHUP"}


class Interruption:
    """Signals to the run at `directory`. asked: the first that has come, so that the next checkpoint is the last."""

    def __init__(self, directory: Path) -> None:
        self.asked: int | None = None
        self._in_training = self._waits = False
        self._fix = f"ontinue with: saekit run --resume {directory}"

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Listen for signals in the block; Interrupted if one stops the run at once."""

        def ask(signum: int, frame: Any) -> None:
            first, self.asked = self.asked is None, self.asked or signum
            at_once = self._waits or not self._in_training or not first
            if at_once and (first or signum == signal.SIGINT):
                raise KeyboardInterrupt

        before = {}
        try:
            for number in _SIGNALS:
                # `nohup` means: go on when the terminal closes.
                if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, ask)
        except ValueError:  # not in the main thread, where a signal never arrives
            yield
            return
        try:
            yield
        except KeyboardInterrupt:
            raise self._error("", f". What was saved is kept; c{self._fix}") from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def in_training(self) -> Iterator[None]:
        """In the block, the first signal only asks."""
        self._in_training = True
        yield
        self._in_training = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """In the block, which is within `in_training`, nothing changes that a checkpoint holds: a signal ends it at once with
        KeyboardInterrupt."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def stop_if_asked(self, number: int, last: int) -> None:
        """Interrupted if a signal has come; `number` of `last` steps are done, and saved."""
        if self.asked is not None:
            if number == 0:
                raise self._error(" before the first step", f". C{self._fix}")
            raise self._error(f" after step {number} of {last}", f"; a checkpoint is saved. C{self._fix}")

    def _error(self, when: str, what_now: str) -> Interrupted:
        number = self.asked or signal.SIGINT
        return Interrupted(f"interrupted{_WORDS.get(signal.Signals(number).name, '')}{when}{what_now}", signal=number)
