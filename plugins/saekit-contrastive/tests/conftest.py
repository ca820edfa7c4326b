"""Shared by the tests of the losses: a source with two concepts, and steps of an SAE."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saekit import Activations, SequenceBatch, SparseAutoencoder, Step
from saekit.testing import make_step

CONCEPTS = ["code", "prose"]


def prepared(part: Any, sae: SparseAutoencoder, labels: torch.Tensor | None = None) -> Any:
    """A loss after `prepare`, with a source whose sequences and rows have these labels."""
    if labels is None:
        labels = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    x = torch.zeros(len(labels), 3, sae.d_in)
    batch = SequenceBatch(x, torch.ones(len(labels), 3, dtype=torch.bool), labels)
    source = types.SimpleNamespace(
        concepts=CONCEPTS,
        sequences=lambda split, n, seed, number: batch,
    )
    config = types.SimpleNamespace(training=types.SimpleNamespace(batch_size=8))
    rows = Activations(x[:, 0], labels=labels)
    part.prepare(
        types.SimpleNamespace(source=source, sae=sae, seed=0, config=config, training_activations=lambda tokens: iter([rows]))
    )
    return part


def step_of(sae: SparseAutoencoder | None = None, **changes: Any) -> Step:
    """A step with labelled rows and labelled sequences."""
    if sae is None:
        changes = {"options": {"k": 8, "decoder_norm": "free"}, **changes}
    return make_step(**{"sae": sae, "labels": True, "sequences": True, "dtype": torch.float64, **changes})


def scaled(sae: SparseAutoencoder, factor: float) -> SparseAutoencoder:
    """A copy whose activations are `factor` times as large, with the same reconstruction."""
    other = copy.deepcopy(sae)
    with torch.no_grad():
        other.W_enc.mul_(factor)
        other.b_enc.mul_(factor)
        other.W_dec.div_(factor)
    return other


@pytest.fixture
def kit() -> types.SimpleNamespace:
    """The functions above: test files import nothing from one another."""
    return types.SimpleNamespace(prepared=prepared, step_of=step_of, scaled=scaled)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.fixture
def largest() -> Largest:
    """To be entered: what is computed inside is recorded."""
    return Largest()
