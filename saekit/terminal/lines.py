"""`LinesView`: plain lines for logs, pipes and scripts, when a phase begins or ends and at intervals in between."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from saekit import protocols
from saekit.hookspecs import hookimpl
from saekit.protocols import RunInfo
from saekit.result import Result
from saekit.terminal.output import console, echo
from saekit.terminal.state import Phase, RunState
from saekit.terminal.summary import render_summary
from saekit.wording import clean, count, duration, label, number, percent, with_intervals

INTERVAL = 5.0  # seconds between lines at first
SHARE = 0.05  # in a long phase the interval is this share of the time it has taken
TENTH = 0.1
QUIET = 30.0  # seconds without a line after which one says that the run goes on


class LinesView:
    """A listener that prints lines without control characters to `file` (stderr by default)."""

    def __init__(self, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self.state = RunState()
        self._said: dict[str, tuple[float, float]] = {}  # by phase: the time of its last line, and its progress then
        self._spoken: int | None = None  # the training step of the last line
        self._spoke = clock()  # when the last line of any kind was printed
        self._lock = threading.Lock()  # of the stream, which a thread of its own writes to when nothing else does
        self._over = threading.Event()

    @hookimpl
    def run_started(self, run: RunInfo) -> None:
        self.state.start(run)
        self._say(f"saekit run {run.directory.path}" + (f" ({self.state.subject})" if self.state.subject else ""))

        if self._clock is time.monotonic:  # no thread can wait by another clock
            threading.Thread(target=self._break_silences, name="saekit-lines", daemon=True).start()

    @hookimpl
    def phase_started(self, phase: str, total: int | None) -> None:
        now = self._clock()
        self.state.phase(phase).begin(total, now)
        self._said[phase] = (now, 0.0)
        self._say(f"{phase}: started")

    @hookimpl
    def harvest_advanced(self, done: int, total: int) -> None:
        self.state.harvested = done / total

    @hookimpl
    def phase_advanced(self, phase: str, done: int) -> None:
        self.state.harvested = None
        one = self.state.phase(phase)
        one.advance(done, self._clock())
        # Training prints a line when it has logged.
        if phase != "train" and self._is_due(one):
            self._say(f"{phase}: {_how_far(one, self._clock())}")

    @hookimpl
    def phase_ended(self, phase: str, seconds: float) -> None:
        self.state.harvested = None
        self.state.phase(phase).end(seconds)
        self._say(f"{phase}: done in {duration(seconds)}")

    @hookimpl
    def logged(self, trainer: protocols.Training, number: int, values: dict[str, float]) -> None:
        training = self.state.training_of(trainer)
        training.log(number + 1, values)
        phase = self.state.phase("train")
        if "tokens" in values and phase.total:
            # The loop logs a step before it reports progress.
            phase.advance(int(values["tokens"]), self._clock())
        # If one variant prints a line for a step, so do the others.
        if training.steps in (self._spoken, training.total_steps) or self._is_due(phase):
            self._spoken = training.steps
            self._say(self._training_line(trainer))

    @hookimpl
    def evaluated(self, metrics: dict[str, float | None], variant: str) -> None:
        values = ", ".join(f"{label(name)} {number(value)}" for name, value in metrics.items())
        self._say(f"held out{_of(variant)}: {values}")

    @hookimpl
    def analysed(self, name: str, result: Result, variant: str) -> None:
        found = with_intervals(result.scalars)
        scalars = ", ".join(f"{label(key)} {number(value)}{interval}" for key, value, interval in found)
        self._say(f"analysed{_of(variant)} {name}: {scalars or 'no scalars'}")

    @hookimpl
    def warned(self, message: str) -> None:
        self._say(f"warning: {message}")

    @hookimpl
    def run_finished(self, summary: dict[str, Any]) -> None:
        self.close()
        # Whatever the environment says about colours, this view prints no control characters.
        drawn = console(file=self._stream, width=100, color_system=None, force_terminal=False, legacy_windows=False)
        render_summary(summary, drawn)

    @hookimpl
    def run_failed(self, error: BaseException) -> None:
        self.close()
        now = self._clock()
        for phase in self.state.fail(now):
            self._say(f"{phase.name}: stopped after {duration(phase.elapsed(now))} by {type(error).__name__}")

    @property
    def _stream(self) -> TextIO:
        return self._file or sys.stderr

    def close(self) -> None:
        """Say nothing more of its own accord; safe to call twice."""
        self._over.set()

    def break_silence(self) -> None:
        """Print a line if there was none for `QUIET` seconds: a component, or the harvest of a block, may take minutes."""
        phase, now = self.state.running(), self._clock()
        if phase is not None and now - self._spoke >= QUIET:
            parts = [f"goes on, {duration(phase.elapsed(now))} so far"]
            parts += [_how_far(phase, now)] if phase.done else []
            if self.state.harvested is not None:
                parts.append(f"{percent(self.state.harvested)} of what it waits for is there")
            self._say(f"{phase.name}: {', '.join(parts)}")

    def _break_silences(self) -> None:
        while not self._over.wait(1.0):
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # closed, or changed while it was read
                self.break_silence()

    def _say(self, text: str) -> None:
        with self._lock:
            self._spoke = self._clock()
            echo(clean(text), file=self._stream)

    def _is_due(self, phase: Phase) -> bool:
        """Whether a tenth of the phase, or the interval, has passed since its last line; if so, note the new line."""
        now, fraction = self._clock(), phase.fraction or 0.0
        then, before = self._said.get(phase.name, (now, 0.0))
        waited = now - then >= max(INTERVAL, SHARE * phase.elapsed(now))
        # Slightly less than a tenth, since the steps of a short run rarely hit it exactly.
        if not waited and fraction - before < TENTH - 1e-9:
            return False
        self._said[phase.name] = (now, fraction)
        return True

    def _training_line(self, trainer: protocols.Training) -> str:
        training, phase = self.state.training_of(trainer), self.state.phase("train")
        values = training.values
        parts = [f"step {training.steps}" + (f"/{training.total_steps}" if training.total_steps else "")]
        if phase.fraction is not None:
            parts.append(percent(phase.fraction))
        if "loss" in values:
            parts.append(f"loss {number(values['loss'])}")
        parts += [f"{row.name} {number(row.value)}" for row in training.losses()]
        parts += [f"{label(name)} {number(value)}" for name, value in training.measures().items()]
        if "lr" in values:
            parts.append(f"lr {values['lr']:.3g}")
        if "tokens_per_second" in values:
            parts.append(f"{count(values['tokens_per_second'])} tokens/s")
        left = phase.left(self._clock())
        if left is not None:
            parts.append(f"{duration(left)} left")
        return f"train{_of(trainer.variant)}: " + ", ".join(parts)


def _of(variant: str) -> str:
    return f" {variant}" if variant else ""


def _how_far(phase: Phase, now: float) -> str:
    parts = [percent(phase.fraction)] if phase.fraction is not None else [count(phase.done)]
    left = phase.left(now)
    return ", ".join([*parts, f"{duration(left)} left"] if left is not None else parts)
