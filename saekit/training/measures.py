"""What losses and callbacks say of a step beside their values: the optional method `measures` of both.

It is called for the steps that are logged, after the optimiser has moved, so it costs nothing in between; a device is waited for
here alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saekit.errors import PluginError, SaekitError


def has_measures(component: Any) -> bool:
    """Whether a loss or a callback has something to say."""
    return callable(getattr(component, "measures", None))


@torch.no_grad()
def measures_of(
    component: Any, about: Any, *, label: str, origin: str, warn: Callable[[str], None]
) -> dict[str, float]:
    """What `component.measures(about)` says, as numbers by `LABEL/NAME`.

    about: the `Step` for a loss, the `Training` for a callback.
    PluginError if it fails or returns anything but numbers by name. One that is not finite is left out, with a warning."""
    try:
        with torch.random.fork_rng(devices=[]):  # how often a run logs must not move its random numbers
            said = component.measures(about)
    except SaekitError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{origin} failed in measures: {type(error).__name__}: {error}. Fix it, or leave {label!r} out of the run; what "
            "was saved is kept."
        ) from error
    if not isinstance(said, dict):
        raise PluginError(f"{origin}: measures returned {type(said).__name__}; it returns numbers by name.")
    numbers = {f"{label}/{name}": _number(name, value, origin) for name, value in said.items()}
    for name, value in numbers.items():
        if not math.isfinite(value):
            warn(f"{name} is not finite, so it is left out of the log. {origin} should leave out what is not defined.")
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _number(name: Any, value: Any, origin: str) -> float:
    if not isinstance(name, str) or not name:
        raise PluginError(f"{origin}: measures returned the name {name!r}; a name is a text.")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise PluginError(f"{origin}: measures returned {name!r} of shape {list(value.shape)}; it returns scalars.")
    if not isinstance(value, Tensor | bool | int | float):
        raise PluginError(f"{origin}: measures returned {name!r} as {type(value).__name__}; it returns scalars.")
    return float(value)
