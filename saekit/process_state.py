"""What a process has only once: the working directory, torch's defaults, whether gradients are on.

A component that changes one of them changes it for all the others: `torch.set_default_dtype` in a plugin that a run does not even
use would give it other weights. So it is put back after each plugin is loaded and after each component's call, and whoever
changed it is named.

Not looked after: the random numbers of `random` and NumPy, which saekit does not use (torch's are a sequence of each SAE's own,
`training/randomness.py`), and what libraries change with every right when they are imported, such as filters of warnings.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from saekit.errors import PluginError


@dataclass(frozen=True)
class _Setting:
    """One thing that a process has once. `read` and `write` are given torch; `fresh` is its value after `import torch`."""

    name: str
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], object]
    fresh: Callable[[Any], Any]


def _matmul_precision(torch: Any) -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by torch's newer interface, which this one cannot express
        return "mixed"


_IN_A_STEP = (
    _Setting(
        "whether gradients are computed",
        lambda torch: torch.is_grad_enabled(),
        lambda torch, on: torch.set_grad_enabled(on),
        lambda torch: True,
    ),
    _Setting(
        "torch's default dtype",
        lambda torch: torch.get_default_dtype(),
        lambda torch, dtype: torch.set_default_dtype(dtype),
        lambda torch: torch.float32,
    ),
)
"""What is looked at around every call within a training step, where a microsecond counts."""
_OF_TORCH = (
    *_IN_A_STEP,
    _Setting(
        "torch's default device",
        lambda torch: torch.empty(0).device,  # a fifth of the time of `get_default_device`
        # None is the CPU without the detour that every call would take for a device that is set
        lambda torch, device: torch.set_default_device(None if device.type == "cpu" else device),
        lambda torch: torch.device("cpu"),
    ),
    _Setting(
        "torch's deterministic mode",
        lambda torch: torch.get_deterministic_debug_mode(),
        lambda torch, mode: torch.set_deterministic_debug_mode(mode),
        lambda torch: 0,
    ),
    _Setting(
        "torch's precision of matrix products",
        _matmul_precision,
        lambda torch, precision: torch.set_float32_matmul_precision(precision),
        lambda torch: "highest",
    ),
    _Setting(
        "torch's number of threads",
        lambda torch: torch.get_num_threads(),
        lambda torch, threads: torch.set_num_threads(threads),
        lambda torch: torch.get_num_threads(),  # as the environment says, which is not known any more
    ),
)


class kept:
    """Put back what the block changes of the process. `warn` is told that `who` did it.

    in_a_step: look only at what is read in nanoseconds and would falsify the training at once.
    PluginError if something cannot be put back.
    """

    __slots__ = ("_before", "_directory", "_failed", "_in_a_step", "_settings", "_warn", "_who")

    def __init__(self, who: str, warn: Callable[[str], object], *, in_a_step: bool = False) -> None:
        self._who, self._warn, self._in_a_step = who, warn, in_a_step
        self._settings = _IN_A_STEP if in_a_step else _OF_TORCH

    def __enter__(self) -> None:
        torch = _torch()
        self._directory = None if self._in_a_step else _directory()
        self._before = None if torch is None else [setting.read(torch) for setting in self._settings]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._failed = error is not None  # nobody's fault then: a generator that was left in the middle keeps what it set
        if not self._in_a_step and (now := _directory()) != self._directory:
            self._put_back("the working directory", self._directory, now, lambda: os.chdir(str(self._directory)), _directory)
        torch = _torch()
        if torch is None:
            return
        before = self._before or [setting.fresh(torch) for setting in self._settings]
        for setting, value in zip(self._settings, before, strict=True):
            now = setting.read(torch)
            if now != value:
                self._put_back(setting.name, value, now, partial(setting.write, torch, value), partial(setting.read, torch))

    def _put_back(self, name: str, before: Any, now: Any, write: Callable[[], Any], read: Callable[[], Any]) -> None:
        changed = f"{self._who} changed {name} from {before} to {now}"
        with contextlib.suppress(OSError, RuntimeError):  # told below
            write()
        if read() != before:
            raise PluginError(f"{changed}, for everything else in this process, and it cannot be put back.")
        if not self._failed:
            self._warn(f"{changed}, for everything else in this process; it has been put back.")


def _torch() -> Any:
    """torch, if something has imported it; None while its import is not over, or if it failed half-way."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "compile") else None


def _directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None
