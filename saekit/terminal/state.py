"""The state of a run in progress: pure bookkeeping, which the views draw and the tests read."""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from saekit import protocols
from saekit.protocols import RunInfo
from saekit.result import Result

PHASES = ("prepare", "harvest", "train", "graph", "evaluate", "analyse", "report")

KNOWN = ("explained_variance", "l0", "dead", "grad_norm")
"""Measures that are shown first; the others follow in the order in which they were logged."""
NOT_MEASURES = {"loss", "lr", "tokens", "tokens_per_second", "seconds", "step"}

RATE_WINDOW = 30.0  # seconds of the past from which the time left is estimated
MARK_SPACING = 0.25  # seconds between two marks at least, so that a fast loop does not fill the window


@dataclass
class Phase:
    """One phase of the run. status: "waiting", "running", "done" or "failed"."""

    name: str
    status: str = "waiting"
    total: int | None = None
    done: int = 0
    seconds: float = 0.0
    _began: float = 0.0
    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    def begin(self, total: int | None, now: float) -> None:
        """The phase starts, or starts again."""
        self.status, self.total, self.done, self._began = "running", total or None, 0, now
        self._marks.clear()

    def advance(self, done: int, now: float) -> None:
        """`done` units are done. The rate is measured from the first call on, since a resumed run does not start at 0."""
        self.done = done
        marks = self._marks
        if len(marks) > 1 and now - marks[-2][0] < MARK_SPACING:
            marks[-1] = (now, done)
        else:
            marks.append((now, done))
        while len(marks) > 2 and now - marks[0][0] > RATE_WINDOW:
            marks.popleft()

    def end(self, seconds: float) -> None:
        """The phase is over and took this many seconds."""
        self.status, self.seconds = "done", seconds

    def fail(self, now: float) -> None:
        """The run stopped in this phase."""
        self.status, self.seconds = "failed", now - self._began

    def elapsed(self, now: float) -> float:
        """Seconds so far, or in total once it is over."""
        return now - self._began if self.status == "running" else self.seconds

    @property
    def fraction(self) -> float | None:
        """How much is done, 0 to 1; None if the total is not known."""
        if self.status == "done":
            return 1.0
        return min(self.done / self.total, 1.0) if self.total else None

    def left(self, now: float) -> float | None:
        """Seconds until the end at the recent rate; None until there is a rate."""
        if self.status != "running" or not self.total or self.done >= self.total or len(self._marks) < 2:
            return None
        (t0, d0), (t1, d1) = self._marks[0], self._marks[-1]
        if t1 - t0 < 2 * MARK_SPACING or d1 <= d0:
            return None
        return max((self.total - d1) * (t1 - t0) / (d1 - d0) - (now - t1), 0.0)


class Trend:
    """The curve of a number over the whole run in bounded memory: when it is full, neighbours are averaged."""

    CAPACITY = 256

    def __init__(self) -> None:
        self._means: list[float] = []
        self._pending: list[float] = []
        self._stride = 1

    def add(self, value: float) -> None:
        """Add the next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._pending.append(value)
        if len(self._pending) >= self._stride:
            self._means.append(sum(self._pending) / len(self._pending))
            self._pending.clear()
        if len(self._means) >= self.CAPACITY:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._stride *= 2

    def points(self, width: int) -> list[float]:
        """At most `width` values from first to last."""
        values = self._means if width > 0 else []
        if len(values) <= width:
            return list(values)
        edges = [i * len(values) // width for i in range(width + 1)]
        return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


@dataclass
class LossRow:
    """One loss as last logged; `contribution` is its share of the total."""

    name: str
    value: float
    weight: float | None
    contribution: float | None
    trend: Trend


@dataclass
class Training:
    """One SAE in training. steps: how many are done. values: the last logged values by key."""

    steps: int = 0
    total_steps: int | None = None
    d_sae: int | None = None
    values: dict[str, float] = field(default_factory=dict)
    trends: dict[str, Trend] = field(default_factory=dict)

    def log(self, steps: int, values: dict[str, float]) -> None:
        """Add one logged line."""
        self.steps = steps
        # A loss that was not logged this time keeps its row and its last value.
        self.values = {**self.values, **values}
        for key, value in values.items():
            if key == "loss" or key.startswith("loss/"):
                self.trends.setdefault(key, Trend()).add(value)

    def losses(self) -> list[LossRow]:
        """Each loss by name, in the order of the run file."""
        rows = []
        for key, value in self.values.items():
            if key.startswith("loss/"):
                name = key.removeprefix("loss/")
                weight = self.values.get(f"weight/{name}")
                rows.append(LossRow(name, value, weight, None if weight is None else weight * value, self.trends[key]))
        return rows

    def measures(self) -> dict[str, float]:
        """Everything else that was logged, well-known measures first."""
        rest = {
            key: value
            for key, value in self.values.items()
            if key not in NOT_MEASURES and not key.startswith(("loss/", "weight/"))
        }
        return {key: rest[key] for key in (*(k for k in KNOWN if k in rest), *(k for k in rest if k not in KNOWN))}


@dataclass
class RunState:
    """The whole run. `training` and `metrics` have an entry for each SAE, by its variant's name ("" without variants)."""

    title: str = ""
    subject: str = ""
    phases: dict[str, Phase] = field(default_factory=lambda: {name: Phase(name) for name in PHASES})
    training: dict[str, Training] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    analyses: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    harvested: float | None = None  # the share of a block, or of what a source prepares, that is there, while the run waits for it

    def start(self, run: RunInfo) -> None:
        """Take name, model and hook point from the run."""
        self.title = run.directory.path.name
        plan, first = run.plan, run.plan.members[0]
        size = f" {first.config.architecture.d_sae:,}" if first.config.architecture.d_sae else ""
        one = f"{first.architecture.component.name}{size}"
        if not any(member.graph for member in plan.members):
            self.phases.pop("graph", None)  # so that it is not shown as still to come
        what = one if len(plan.members) == 1 else f"{len(plan.members)} variants"
        facts = (what, plan.facts.get("model"), plan.facts.get("hook_point"))
        self.subject = " · ".join(str(fact) for fact in facts if fact)

    def running(self) -> Phase | None:
        """The phase that began last of those that are running."""
        running = [phase for phase in self.phases.values() if phase.status == "running"]
        return max(running, key=lambda phase: phase._began, default=None)

    def phase(self, name: str) -> Phase:
        """The phase with this name; a new one is added at the end."""
        return self.phases.setdefault(name, Phase(name))

    def analysed(self, name: str, result: Result, variant: str) -> None:
        """Add the scalars of an analyzer's result."""
        self.analyses[f"{variant} {name}".strip()] = dict(result.scalars)

    def training_of(self, trainer: protocols.Training) -> Training:
        """The entry of this trainer's SAE."""
        entry = self.training.setdefault(trainer.variant, Training())
        entry.total_steps, entry.d_sae = trainer.total_steps, trainer.sae.d_sae
        return entry

    def fail(self, now: float) -> list[Phase]:
        """Mark the running phases as failed, and return them."""
        failed = [phase for phase in self.phases.values() if phase.status == "running"]
        for phase in failed:
            phase.fail(now)
        return failed

    def shown_phases(self) -> list[Phase]:
        """The phases without skipped ones: a waiting phase before one that has begun will not run."""
        phases = list(self.phases.values())
        reached = max((i for i, phase in enumerate(phases) if phase.status != "waiting"), default=-1)
        return [phase for i, phase in enumerate(phases) if phase.status != "waiting" or i > reached]
