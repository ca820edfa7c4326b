"""The device a run uses, and the memory it took."""

from __future__ import annotations

import resource
import sys

import torch

from saekit.errors import UsageError


def choose_device(wanted: str, precision: str) -> torch.device:
    """`auto` takes CUDA, then Apple's GPU, then the CPU. UsageError if device or precision cannot be used here."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"training.device: {wanted!r} cannot be used here ({reason}). Use auto or cpu.") from None
    if precision == "bf16" and device.type != "cuda":
        raise UsageError(
            f'training.precision: bf16 runs on CUDA only; on {device.type} it is far slower than fp32. Use "fp32".'
        )
    return device


def peak_memory(device: torch.device) -> int:
    """Peak bytes held: on the GPU for CUDA, otherwise resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
