"""The surroundings in which an SAE and a model compute, put back afterwards: modes, autocast, random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def own_numerics(sae: nn.Module, device: torch.device) -> Iterator[None]:
    """In the SAE's own dtype, whatever autocast surrounds it, and in evaluation mode.

    In training mode a gate may look at the whole batch and keep statistics of it (batchtopk does).
    """
    with evaluating(sae), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def evaluating(sae: nn.Module) -> Iterator[None]:
    """With every module that is in training mode in evaluation mode."""
    training = [module for module in sae.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """With the generators of the CPU and of `device` seeded; both are put back where they stood."""
    numbers = []
    if device.type == "cuda":
        numbers = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(numbers):
        torch.default_generator.manual_seed(seed)
        for number in numbers:
            torch.cuda.default_generators[number].manual_seed(seed)
        yield
