"""A small trainer with latents that cannot fire, and batches for it."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saekit import SparseAutoencoder
from saekit.activations.batch import Activations
from saekit.builtin.architectures.topk import TopK
from saekit.builtin.losses import mse
from saekit.config import TrainingConfig
from saekit.listeners import Listener, Listeners
from saekit.training.loss_terms import Term
from saekit.training.trainer import Trainer

D, F, BATCH = 8, 32, 64
DEAD = [3, 17, 30]


@pytest.fixture
def trainer_with() -> Callable[..., Trainer]:
    """Makes a trainer of a callback (and an SAE) whose latents 3, 17 and 30 cannot fire."""

    def make(callback: Any, sae: SparseAutoencoder | None = None) -> Trainer:
        sae = sae or TopK(D, F, k=4)
        generator = torch.Generator().manual_seed(0)
        sae.initialise(generator, torch.randn(100, D, generator=generator))
        never = torch.zeros(F)
        never[DEAD] = -1e6
        sae.shift_pre_activations(never)
        listeners = Listeners()
        listeners.add(Listener("resample", callback, "callback 'resample'", vital=True))
        config = TrainingConfig(tokens=BATCH * 100, batch_size=BATCH, lr=1e-3)
        term = Term("mse", mse, 1.0, SimpleNamespace(origin="loss 'mse'"))
        return Trainer(sae, [term], config, total_steps=100, scale=1.0, device=torch.device("cpu"), listeners=listeners)

    return make


@pytest.fixture
def batches() -> Callable[..., Iterator[Activations]]:
    """Makes n batches from a seed."""

    def make(n: int, seed: int = 1) -> Iterator[Activations]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n):
            yield Activations(torch.randn(BATCH, D, generator=generator))

    return make
