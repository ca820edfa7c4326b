"""torch's global generators with one state for each SAE of a run, so that what one draws does not affect another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class OwnRandomness:
    """A separate sequence, beginning at `seed`, for what `torch.rand` and its like draw inside `drawing()`."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._device = seed, device
        self._states: list[Tensor] | None = None  # of the host, and of the device if that is CUDA

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from this sequence in the block, and leave the generators as they were found."""
        outside = self._read()
        if self._states is None:
            torch.manual_seed(self._seed)
        else:
            self._write(self._states)
        try:
            yield
        finally:
            self._states = self._read()
            self._write(outside)

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else states

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)
