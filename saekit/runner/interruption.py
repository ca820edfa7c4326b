"""What Ctrl-C does to a run: in training it ends the step and saves a checkpoint; elsewhere, or pressed twice, it stops at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saekit.errors import Interrupted


class Interruption:
    """Ctrl-C in the run at `directory`. asked: whether it has been pressed in training, so that the next checkpoint is the last."""

    def __init__(self, directory: Path) -> None:
        self.asked = self._in_training = False
        self._fix = f"ontinue with: saekit run --resume {directory}"

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Listen for Ctrl-C in the block; Interrupted if it stops the run at once."""

        def ask(signum: int, frame: Any) -> None:
            if self.asked or not self._in_training:
                raise KeyboardInterrupt
            self.asked = True

        try:
            before = signal.signal(signal.SIGINT, ask)
        except ValueError:  # not in the main thread, where a signal never arrives
            yield
            return
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted. What was saved is kept; c{self._fix}") from None
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def in_training(self) -> Iterator[None]:
        """In the block, the first Ctrl-C only asks."""
        self._in_training = True
        yield
        self._in_training = False

    def stop_if_asked(self, number: int, last: int) -> None:
        """Interrupted if Ctrl-C has been pressed; `number` of `last` steps are done, and saved."""
        if self.asked:
            raise Interrupted(f"interrupted after step {number} of {last}; a checkpoint is saved. C{self._fix}")
