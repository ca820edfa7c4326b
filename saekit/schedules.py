"""Numbers that change over a run: a loss's weight, the learning rate.

A schedule is a small pydantic model with one method, `at(step, total)`. In a run file it is a number, or a table
such as `{schedule = "linear", to = 1.0, steps = 6000}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from saekit.options import refuse_odd_numbers


class _Schedule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    _numbers = field_validator("*", mode="before")(classmethod(refuse_odd_numbers))

    def breaks(self, total: int) -> list[int]:
        """The steps at which a new piece begins; within a piece the value only rises, only falls or stays."""
        return []


class Linear(_Schedule):
    """From `start_value` to `to` over `steps` steps, beginning at step `begin`, and constant on both sides."""

    schedule: Literal["linear"]
    to: float = Field(description="The value at the end.")
    steps: int = Field(gt=0, description="Steps from one value to the other.")
    start_value: float = Field(default=0.0, description="The value before.")
    begin: int = Field(default=0, ge=0, description="The step at which it begins to move.")

    def at(self, step: int, total: int) -> float:
        """The value at `step` (0 for the first) of `total`."""
        share = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        return self.start_value + (self.to - self.start_value) * share


class Cosine(_Schedule):
    """A linear warm-up from 0 to `to` over `warmup` steps, then half a cosine down to `end` at the run's last step.

    The decay is that of Loshchilov and Hutter (2017, eq. 5) without restarts.
    """

    schedule: Literal["cosine"]
    to: float = Field(default=1.0, description="The value after the warm-up.")
    warmup: int = Field(default=0, ge=0, description="Steps of the linear warm-up from 0.")
    end: float = Field(default=0.0, description="The value at the run's last step.")

    def at(self, step: int, total: int) -> float:
        """The value at `step` (0 for the first) of `total`."""
        if step < self.warmup:
            return self.to * (step + 1) / self.warmup
        share = min((step - self.warmup) / max(total - 1 - self.warmup, 1), 1.0)
        return self.end + (self.to - self.end) * 0.5 * (1.0 + math.cos(math.pi * share))

    def breaks(self, total: int) -> list[int]:
        """The end of the warm-up."""
        return [self.warmup]


class WarmupDecay(_Schedule):
    """A linear warm-up over `warmup` steps to `to`, constant, then linear to `end` over the run's last `decay` share."""

    schedule: Literal["warmup_decay"]
    to: float = Field(default=1.0, description="The value between warm-up and decay.")
    warmup: int = Field(default=0, ge=0, description="Steps of the linear warm-up from 0.")
    decay: float = Field(default=0.2, ge=0.0, le=1.0, description="The share of the run, at its end, that decays.")
    end: float = Field(default=0.0, description="The value that the decay runs to.")

    def at(self, step: int, total: int) -> float:
        """The value at `step` (0 for the first) of `total`."""
        if step < self.warmup:
            return self.to * (step + 1) / self.warmup
        left, falling = total - step, self.decay * total
        if left >= falling:
            return self.to
        return self.end + (self.to - self.end) * left / falling

    def breaks(self, total: int) -> list[int]:
        """The end of the warm-up, and the first step of the decay."""
        return [self.warmup, math.floor(total - self.decay * total) + 1]


class Steps(_Schedule):
    """Constant pieces: `values[i]` holds from step `at_steps[i - 1]` on, so there is one value more than steps."""

    schedule: Literal["steps"]
    values: list[float] = Field(min_length=1, description="The values of the pieces.")
    at_steps: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list, description="The step at which each value but the first begins."
    )

    @model_validator(mode="after")
    def _one_value_more(self) -> Steps:
        if len(self.values) != len(self.at_steps) + 1:
            raise ValueError("needs exactly one value more than at_steps")
        if self.at_steps != sorted(set(self.at_steps)):
            raise ValueError("at_steps must rise from each to the next")
        return self

    def at(self, step: int, total: int) -> float:
        """The value at `step` (0 for the first) of `total`."""
        return self.values[sum(step >= boundary for boundary in self.at_steps)]

    def breaks(self, total: int) -> list[int]:
        """The steps at which the value changes."""
        return self.at_steps


SCHEDULES: dict[str, type[BaseModel]] = {
    "linear": Linear,
    "cosine": Cosine,
    "warmup_decay": WarmupDecay,
    "steps": Steps,
}
"""Every kind of schedule by its word in a run file."""


def _branch(value: Any) -> str:
    """Which of the forms below a value has, so that an error is about that form alone."""
    if isinstance(value, Mapping):
        return str(value.get("schedule"))
    return value.schedule if isinstance(value, Linear | Cosine | WarmupDecay | Steps) else "number"


Scheduled = Annotated[
    Annotated[float, Tag("number")]
    | Annotated[Linear, Tag("linear")]
    | Annotated[Cosine, Tag("cosine")]
    | Annotated[WarmupDecay, Tag("warmup_decay")]
    | Annotated[Steps, Tag("steps")],
    Discriminator(
        _branch,
        custom_error_type="schedule",
        custom_error_message='is neither a number nor a table with schedule = "linear", "cosine", "warmup_decay" or "steps"',
    ),
]
"""A number, or a schedule of it."""


def value_at(value: float | Linear | Cosine | WarmupDecay | Steps, step: int, total: int) -> float:
    """The number itself, or the schedule's value at `step` of `total`."""
    return value if isinstance(value, (int, float)) else value.at(step, total)


def extreme_steps(value: float | Linear | Cosine | WarmupDecay | Steps, total: int) -> tuple[int, int]:
    """A step at which the value is smallest, and one at which it is largest, in a run of `total` steps (> 0).

    Takes as long for a long run as for a short one: extremes are at the ends of a schedule's pieces.
    """
    breaks = [] if isinstance(value, (int, float)) else value.breaks(total)
    ends = {0, total - 1, *(step for first in breaks for step in (first - 1, first) if 0 <= step < total)}
    by_value = {step: value_at(value, step, total) for step in sorted(ends)}
    return min(by_value, key=by_value.__getitem__), max(by_value, key=by_value.__getitem__)
