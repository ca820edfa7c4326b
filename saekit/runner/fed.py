"""`FedRun`: a run whose activations a program pushes between its own steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from saekit.errors import RunError, SaekitError
from saekit.protocols import PushedSource
from saekit.runner.run import Run


class FedRun(Run):
    """The phases of a run, each part of which is carried out when the program asks for it, in the program's thread.

    The time between two parts is the program's; it counts as waiting for activations ("harvest"). Signals are the program's too.
    """

    source: PushedSource
    _is_fed = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stage = contextlib.ExitStack()  # the phase that is under way
        self._is_training = False
        self._is_whole = True  # whether every step that was begun has ended
        self._told = False  # whether listeners know of a failure
        self._left = time.perf_counter()  # when the program was last given back control

    @property
    def is_over(self) -> bool:
        """Whether all steps are done."""
        return self.number >= self.plan.total_steps

    def begin(self) -> None:
        """Open the source. What a checkpoint holds of it is given back to it, and `number` tells how many steps are done."""
        with self._part():
            self._begin()
            self._stage.enter_context(self._phase("prepare", None))
            self._open()
            state = self._newest_checkpoint()
            if state is not None:
                with self._refusing_a_damaged_one():
                    state.restore_source(self.source)
                self.number = self._saved = state.step

    def step(self) -> None:
        """One step of every SAE, on what the source holds."""
        self._is_whole = False
        with self._part():
            if not self._is_training:
                self._start()
            self._step()
        self._is_whole = True

    def save(self) -> None:
        """Write a checkpoint, unless there is one of this step."""
        if self._is_training and self.number != self._saved:
            self._checkpoint(self.number, self._batches.position)
            self._saved = self.number

    def finish(self) -> dict[str, Any]:
        """Carry out all that follows training; returns the content of `summary.json`. See `Run.execute` for its errors."""
        with self._part():
            if not self._is_training:
                if not self.number or self.source.held < self.config.training.batch_size:
                    raise RunError(self._too_little)
                self._start()  # the run had been killed between its last step and the end
            if not self.is_over:
                self.warn(
                    f"The program ended after {self.number} of {self.plan.total_steps} steps, so schedules that go by the length "
                    f"of the run were cut short. Next time set training.tokens = {self.number * self.config.training.batch_size}."
                )
            self.save()
            self._batches.close()
            self._end_training()
            self._stage.close()
            summary = self._trained()
        self._raise_failures(summary)
        return summary

    def leave(self, error: BaseException) -> None:
        """The program failed: save a checkpoint, if no step was cut short, and tell listeners."""
        if self._told:
            return
        try:
            if self._is_whole:
                self.save()
        except SaekitError as other:
            error.add_note(f"saekit: no checkpoint could be saved of the run in {self.directory.path}: {other}")
        self._tell("run_failed", error=error)

    @contextlib.contextmanager
    def _part(self) -> Iterator[None]:
        """A part of the run is carried out in the block."""
        self._add_seconds("harvest", time.perf_counter() - self._left)
        try:
            with self._at_work():
                yield
        except BaseException:
            self._told = True
            raise
        finally:
            self._left = time.perf_counter()

    def _start(self) -> None:
        self._initialise()
        self._stage.close()
        self._stage.enter_context(self._phase("train", self.plan.total_steps * self.config.training.batch_size))
        self._start_training()
        self._is_training = True

    @property
    def _too_little(self) -> str:
        training = self.config.training
        return (
            f"nothing was trained: {self.source.held} activations are held for training, and a step takes {training.batch_size}. "
            "Push more, or lower source.fill, source.every or training.batch_size."
        )

    @property
    def _how_to_go_on(self) -> str:
        return f"saekit.Online.resume({str(self.directory.path)!r}), in the program that pushes"

    @property
    def _how_to_measure_again(self) -> str:
        return "What failed cannot be carried out again, since what the program pushed is gone."
