"""A scripted run: the hooks that a real run calls, in its order, on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saekit.listeners import Listener, Listeners
from saekit.result import Result

STEPS, BATCH, EVERY = 400, 2048, 10
DIRECTORY = Path("runs/2026-11-20-quickstart-3f2a")
METRICS = {
    "explained_variance": 0.9134,
    "l0": 32.0,
    "dead_fraction": 0.0024,
    "ce_recovered": 0.9512,
    "probe_score": None,
}
SUMMARY: dict[str, Any] = {
    "run": DIRECTORY.name,
    "recipe": "quickstart",
    "directory": str(DIRECTORY),
    "model": "organism",
    "hook_point": "blocks.2.hook_out",
    "sae": {"architecture": "topk", "d_in": 256, "d_sae": 4096},
    "metrics": METRICS,
    "headline": ["explained_variance", "l0", "ce_recovered", "probe_score"],
    "analysis": {"steer": {"shift": None, "strength": 15.0}},
    "losses": {"mse": 0.12, "hoyer": 22.5},
    "tokens": STEPS * BATCH,
    "steps": STEPS,
    "seconds": {"prepare": 4.0, "harvest": 12.0, "train": 48.0, "evaluate": 6.0, "analyse": 9.0, "report": 1.0},
    "tokens_per_second": 16_384.0,
    "peak_memory_bytes": 3 * 2**29,
    "plugins": [],
    "warnings": ["loss 'auxk': had nothing to say [in 12 of 488 steps]."],
}


class ScriptedRun:
    """Plays a run to one listener through the real `Listeners`, which refuses misspelt hooks.

    now: the clock, in seconds. trainer: what the hooks hand over.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.trainer = SimpleNamespace(total_steps=STEPS, number=0, sae=SimpleNamespace(d_sae=4096), variant="")
        self.run = SimpleNamespace(
            directory=SimpleNamespace(path=DIRECTORY),
            plan=SimpleNamespace(
                members=[
                    SimpleNamespace(
                        config=SimpleNamespace(architecture=SimpleNamespace(d_sae=4096)),
                        architecture=SimpleNamespace(component=SimpleNamespace(name="topk")),
                        graph=None,
                    )
                ],
                facts={"model": "organism", "hook_point": "blocks.2.hook_out"},
            ),
        )
        self.listeners = Listeners()

    def clock(self) -> float:
        """The clock to give to a view."""
        return self.now

    def watch(self, view: Any) -> Any:
        """Add the view, as one that stops the run if it fails, so that a test sees it."""
        self.listeners.add(Listener("view", view, "the view", vital=True))
        return view

    def values(self, step: int, **more: float) -> dict[str, float]:
        """What is logged after step `step`."""
        done = (step + 1) / STEPS
        return {
            "loss": 1.0 - 0.8 * done,
            "loss/mse": 0.9 - 0.8 * done,
            "loss/hoyer": 30.0 - 7.5 * done,
            "weight/mse": 1.0,
            "weight/hoyer": 0.002,
            "explained_variance": 0.1 + 0.8 * done,
            "l0": 32.0,
            "dead": 41.0,
            "lr": 1e-3,
            "grad_norm": 0.5,
            "gate_temperature": 1.75,
            "tokens": float((step + 1) * BATCH),
            "tokens_per_second": 16_384.0,
            **more,
        }

    def begin(self) -> None:
        """Up to the first step."""
        self.listeners.emit("run_started", run=self.run)
        self.listeners.emit("phase_started", phase="prepare", total=None)
        self.now += 4
        self.listeners.emit("phase_ended", phase="prepare", seconds=4.0)
        self.listeners.emit("phase_started", phase="train", total=STEPS * BATCH)
        self.listeners.emit("training_started", trainer=self.trainer)

    def steps(self, start: int = 0, stop: int = STEPS, seconds: float = 0.1) -> Iterator[int]:
        """Train steps `start` up to `stop`, handing each to the test before it counts."""
        for step in range(start, stop):
            self.now += seconds
            self.trainer.number = step + 1
            if (step + 1) % EVERY == 0:
                self.listeners.emit("logged", trainer=self.trainer, number=step, values=self.values(step))
            self.listeners.emit("phase_advanced", phase="train", done=(step + 1) * BATCH)
            yield step

    def train(self, start: int = 0, stop: int = STEPS, seconds: float = 0.1) -> None:
        """The same without looking."""
        for _ in self.steps(start, stop, seconds):
            pass

    def finish(self) -> None:
        """From the last step to the end."""
        emit = self.listeners.emit
        emit("phase_ended", phase="train", seconds=40.0)
        emit("phase_started", phase="evaluate", total=100_000)
        for done in range(10_000, 110_000, 10_000):
            self.now += 0.6
            emit("phase_advanced", phase="evaluate", done=done)
        emit("evaluated", metrics=METRICS, variant="")
        emit("phase_ended", phase="evaluate", seconds=6.0)
        emit("phase_started", phase="analyse", total=1)
        emit("analysed", name="steer", result=Result(scalars={"shift": None, "strength": 15.0}), variant="")
        emit("phase_advanced", phase="analyse", done=1)
        emit("phase_ended", phase="analyse", seconds=9.0)
        emit("phase_started", phase="report", total=None)
        emit("phase_ended", phase="report", seconds=1.0)
        emit("run_finished", run=self.run, summary=SUMMARY)

    def fail(self, error: BaseException) -> None:
        """The run stops here."""
        self.listeners.emit("run_failed", run=self.run, error=error)


@pytest.fixture
def script() -> ScriptedRun:
    """A run that has not begun."""
    return ScriptedRun()


@pytest.fixture
def document() -> dict[str, Any]:
    """What summary.json holds."""
    return SUMMARY
