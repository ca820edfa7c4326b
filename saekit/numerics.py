"""Contexts for computing with an SAE or a model: evaluation mode, no autocast, a seed. All restore the previous state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def own_numerics(sae: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute in the SAE's own dtype, even inside autocast, and in evaluation mode.

    In training mode a gate may depend on the whole batch and keep statistics of it, as batchtopk does.
    """
    with evaluating(sae), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def evaluating(sae: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back afterwards."""
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
    """Seed the generators of the CPU and of `device`, and restore both afterwards."""
    numbers = []
    if device.type == "cuda":
        numbers = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(numbers):
        torch.default_generator.manual_seed(seed)
        for number in numbers:
            torch.cuda.default_generators[number].manual_seed(seed)
        yield
