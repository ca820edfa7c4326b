"""Numbers that change over a run: a loss's weight, the learning rate.

A schedule is a small pydantic model with one method, `at(step, total)`. In a run file it is a number, or a table
such as `{schedule = "linear", to = 1.0, steps = 6000}`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Schedule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Linear(_Schedule):
    """From `start_value` to `to` over `steps` steps, beginning at step `begin`, and constant on both sides."""

    schedule: Literal["linear"]
    to: float
    steps: int = Field(gt=0)
    start_value: float = 0.0
    begin: int = Field(default=0, ge=0)

    def at(self, step: int, total: int) -> float:
        """The value at `step` (0 for the first) of `total`."""
        share = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        return self.start_value + (self.to - self.start_value) * share


class Cosine(_Schedule):
    """A linear warm-up from 0 to `to` over `warmup` steps, then half a cosine down to `end` at the run's last step.

    The decay is that of Loshchilov and Hutter (2017, eq. 5) without restarts.
    """

    schedule: Literal["cosine"]
    to: float = 1.0
    warmup: int = Field(default=0, ge=0)
    end: float = 0.0

    def at(self, step: int, total: int) -> float:
        """The value at `step` (0 for the first) of `total`."""
        if step < self.warmup:
            return self.to * (step + 1) / self.warmup
        share = min((step - self.warmup) / max(total - 1 - self.warmup, 1), 1.0)
        return self.end + (self.to - self.end) * 0.5 * (1.0 + math.cos(math.pi * share))


class WarmupDecay(_Schedule):
    """A linear warm-up over `warmup` steps to `to`, constant, then linear to `end` over the run's last `decay` share."""

    schedule: Literal["warmup_decay"]
    to: float = 1.0
    warmup: int = Field(default=0, ge=0)
    decay: float = Field(default=0.2, ge=0.0, le=1.0)
    end: float = 0.0

    def at(self, step: int, total: int) -> float:
        """The value at `step` (0 for the first) of `total`."""
        if step < self.warmup:
            return self.to * (step + 1) / self.warmup
        left, falling = total - step, self.decay * total
        if left >= falling:
            return self.to
        return self.end + (self.to - self.end) * left / falling


class Steps(_Schedule):
    """Constant pieces: `values[i]` holds from step `at_steps[i - 1]` on, so there is one value more than steps."""

    schedule: Literal["steps"]
    values: list[float] = Field(min_length=1)
    at_steps: list[int] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_value_more(self) -> Steps:
        if len(self.values) != len(self.at_steps) + 1:
            raise ValueError("needs exactly one value more than at_steps")
        if self.at_steps != sorted(self.at_steps):
            raise ValueError("at_steps must rise")
        return self

    def at(self, step: int, total: int) -> float:
        """The value at `step` (0 for the first) of `total`."""
        return self.values[sum(step >= boundary for boundary in self.at_steps)]


Schedule = Annotated[Union[Linear, Cosine, WarmupDecay, Steps], Field(discriminator="schedule")]


def value_at(value: float | Linear | Cosine | WarmupDecay | Steps, step: int, total: int) -> float:
    """The number itself, or the schedule's value at `step` of `total`."""
    return value if isinstance(value, (int, float)) else value.at(step, total)
