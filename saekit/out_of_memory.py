"""Whether an error means that memory ran out."""

from __future__ import annotations

import torch

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` says that a device, or the machine, has too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On a CPU torch raises a RuntimeError with the words of its allocator.
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
