"""`LiveView`: one block on stderr that follows a run through all of its phases."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

from saekit import protocols
from saekit.hookspecs import hookimpl
from saekit.protocols import RunInfo
from saekit.result import Result
from saekit.terminal import output
from saekit.terminal.block import draw
from saekit.terminal.state import RunState
from saekit.terminal.summary import render_summary

FRAMES_PER_SECOND = 4  # a frame costs the training a few milliseconds


class LiveView:
    """A listener that redraws one block a few times a second, and prints the summary when the run is over.

    The hooks only store numbers; rich's own thread draws, so that the seconds keep counting while a model loads.
    Nothing is written to stdout.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or output.console(stderr=True)
        self.state = RunState()
        self._clock = clock
        self._lock = threading.Lock()  # the drawing thread must not read a dictionary while it changes
        self._live: Live | None = None

    @hookimpl
    def run_started(self, run: RunInfo) -> None:
        self.state.start(run)
        # Whatever is printed would break the block, so it is redirected above it, unless stdout is a file.
        both = sys.stdout is not None and sys.stdout.isatty()
        self._live = Live(
            console=self.console,
            get_renderable=self._draw,
            refresh_per_second=FRAMES_PER_SECOND,
            redirect_stdout=both,
            transient=True,
        )
        self._live.start()

    @hookimpl
    def phase_started(self, phase: str, total: int | None) -> None:
        with self._lock:
            self.state.phase(phase).begin(total, self._clock())

    @hookimpl
    def harvest_advanced(self, done: int, total: int) -> None:
        with self._lock:
            self.state.harvested = done / total

    @hookimpl
    def phase_advanced(self, phase: str, done: int) -> None:
        with self._lock:
            self.state.harvested = None
            self.state.phase(phase).advance(done, self._clock())

    @hookimpl
    def phase_ended(self, phase: str, seconds: float) -> None:
        with self._lock:
            self.state.harvested = None
            self.state.phase(phase).end(seconds)

    @hookimpl
    def training_started(self, trainer: protocols.Training) -> None:
        with self._lock:
            self.state.training_of(trainer).steps = trainer.number

    @hookimpl
    def logged(self, trainer: protocols.Training, number: int, values: dict[str, float]) -> None:
        with self._lock:
            self.state.training_of(trainer).log(number + 1, values)

    @hookimpl
    def evaluated(self, metrics: dict[str, float | None], variant: str) -> None:
        with self._lock:
            self.state.metrics[variant] = dict(metrics)

    @hookimpl
    def analysed(self, name: str, result: Result, variant: str) -> None:
        with self._lock:
            self.state.analysed(name, result, variant)

    @hookimpl
    def warned(self, message: str) -> None:
        with self._lock:
            self.state.warnings.append(message)

    @hookimpl
    def run_finished(self, summary: dict[str, Any]) -> None:
        self.close()
        render_summary(summary, self.console)

    @hookimpl
    def run_failed(self) -> None:
        """Restore the terminal and leave the last block: how far the run got explains the failure."""
        with self._lock:
            self.state.fail(self._clock())
        if self._live is not None:
            self.close()
            self.console.print(self._draw())

    def close(self) -> None:
        """Remove the block and restore the terminal; safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> RenderableType:
        with self._lock:
            return draw(self.state, self.console.width, self.console.height, self._clock())
