"""How many hostile inputs a test gets."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

TOTAL = int(os.environ.get("SAEKIT_FUZZ", "0"))
"""Hostile inputs in all with `make fuzz`, which draws them from the seed that it prints."""
SMALL = 240
"""Otherwise: always the same ones."""


def inputs(share: float, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`hypothesis.given` for this share of all inputs. The shares of `test_hostile_inputs.py` add up to 1."""
    chosen = settings(
        max_examples=max(1, round(share * (TOTAL or SMALL))),
        deadline=None,
        derandomize=not TOTAL,
        database=None,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: chosen(given(**strategies)(test))
