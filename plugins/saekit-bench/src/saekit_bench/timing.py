"""Timing that can be trusted on a busy machine: candidates take turns, and the result is a median with quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: the median of all rounds, and the quartiles."""

    median: float
    low: float
    high: float

    def over(self, floor: Timing) -> dict[str, float]:
        """This candidate in units of another one."""
        return {name: getattr(self, name) / floor.median for name in ("median", "low", "high")}


def alternate(candidates: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time each candidate once in every round, after a round that does not count. Waits for the device around each."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, candidate in candidates.items():
            _wait(device)
            began = time.perf_counter()
            candidate()
            _wait(device)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
