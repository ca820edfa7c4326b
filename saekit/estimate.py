"""`Estimate`: a metric's value with what its reader needs beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from saekit.intervals import Interval


@dataclass(frozen=True)
class Estimate:
    """A metric's value with its interval, what it was measured on, and a sentence. The terminal and the report show them.

    value: None if it is not defined.
    interval: its 95% confidence interval, such as that of `wilson_interval`; None without one.
    n: how many of what stand behind it, such as `{"sequences": 64}`.
    note: what the reader must know of this value, such as that it is at chance; empty if there is nothing to say.
    """

    value: float | None
    interval: Interval | None = None
    n: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    def beside(self) -> dict[str, Any]:
        """What stands beside the value in `summary.json`: those of `interval`, `n` and `note` that there are."""
        found = {"interval": None if self.interval is None else list(map(float, self.interval)), "n": dict(self.n)}
        return {name: value for name, value in {**found, "note": self.note}.items() if value}


def value_of(given: float | Estimate | None) -> float | None:
    """A metric's value as a plain number, with or without an estimate around it."""
    value = given.value if isinstance(given, Estimate) else given
    return None if value is None else float(value)
