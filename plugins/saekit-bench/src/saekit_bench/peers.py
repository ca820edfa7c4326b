"""The same training step by other libraries that are installed: sae_lens, sparsify, dictionary_learning.

Each is used as its own trainer does, with its own defaults unless they change the task. A step is a function without
arguments, on random activations in rotation.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PEERS = {"sae_lens": "sae_lens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}
"""Each peer's name, and the module whose presence shows that it is installed."""

LEARNING_RATE = 1e-9
"""The learning rate of every side: there is nothing to learn from noise, and the number of active latents must not change."""


def peer_steps(
    architecture: str, options: dict[str, Any], d_in: int, d_sae: int, batches: list[Tensor], bias: float | None = None
) -> dict[str, Callable[[], object]]:
    """A step of every installed peer that has the architecture.

    bias: set the encoder's biases to this before the first step, for gates that do not count latents."""
    steps = {}
    for name, module in PEERS.items():
        if importlib.util.find_spec(module) is None:
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what it prints on import is not a result
                step = _MAKERS[name](architecture, options, d_in, d_sae, batches, bias)
        except ImportError as error:  # installed, but without something that it needs
            warnings.warn(f"{name} is installed but cannot be imported: {error}", stacklevel=2)
            continue
        if step is not None:
            steps[name] = step
    return steps


def _turns(batches: list[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from batches


def sae_lens_config(architecture: str, options: dict[str, Any], d_in: int, d_sae: int, device: str) -> Any:
    """sae_lens's configuration of a training SAE for one of our architectures, or None if it has none."""
    import sae_lens

    classes = {
        "topk": sae_lens.TopKTrainingSAEConfig,
        "batchtopk": sae_lens.BatchTopKTrainingSAEConfig,
        "jumprelu": sae_lens.JumpReLUTrainingSAEConfig,
        "standard": sae_lens.StandardTrainingSAEConfig,
        "gated": sae_lens.GatedTrainingSAEConfig,
        "matryoshka": sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
    }
    if architecture not in classes:
        return None
    return classes[architecture](**{"d_in": d_in, "d_sae": d_sae, "device": device, **options})


def sae_lens_sae(architecture: str, options: dict[str, Any], d_in: int, d_sae: int, device: str) -> Any:
    """sae_lens's training SAE for one of our architectures, or None if it has none."""
    from sae_lens import TrainingSAE

    config = sae_lens_config(architecture, options, d_in, d_sae, device)
    return None if config is None else TrainingSAE.from_dict(config.to_dict())


def sae_lens_trainer(sae: Any, data: Iterator[Tensor], tokens: int, batch: int, lr: float, **more: Any) -> Any:
    """sae_lens's own trainer around a training SAE and an iterator of activations."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    device = str(next(sae.parameters()).device)
    settings = {"lr": lr, "lr_end": lr / 10, "device": device, **more}
    return SAETrainer(
        SAETrainerConfig(total_training_samples=tokens, train_batch_size_samples=batch, **settings), sae, data
    )


def _sae_lens(
    architecture: str, options: dict[str, Any], d_in: int, d_sae: int, batches: list[Tensor], bias: float | None
) -> Callable[[], object] | None:
    kept = {key: options[key] for key in ("k",) if key in options}
    sae = sae_lens_sae(architecture, kept, d_in, d_sae, str(batches[0].device))
    if sae is None:
        return None
    if bias is not None:
        for name in ("b_enc", "b_gate"):
            if hasattr(sae, name):
                getattr(sae, name).data.fill_(bias)
    turn = _turns(batches)
    batch = len(batches[0])
    trainer = sae_lens_trainer(sae, turn, batch * 10**6, batch, LEARNING_RATE)

    def step() -> None:
        trainer.step(next(turn))
        trainer.n_training_steps += 1

    return step


def _sparsify(
    architecture: str, options: dict[str, Any], d_in: int, d_sae: int, batches: list[Tensor], bias: float | None
) -> Callable[[], object] | None:
    if architecture != "topk":
        return None
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=options.get("k", 32)), device=batches[0].device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE, fused=True)
    turn = _turns(batches)

    def step() -> None:
        coder(next(turn)).fvu.backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        coder.set_decoder_norm_to_unit_norm()

    return step


def _dictionary_learning(
    architecture: str, options: dict[str, Any], d_in: int, d_sae: int, batches: list[Tensor], bias: float | None
) -> Callable[[], object] | None:
    if architecture not in ("topk", "batchtopk"):
        return None
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer_class = TopKTrainer if architecture == "topk" else BatchTopKTrainer
    settings = {"activation_dim": d_in, "dict_size": d_sae, "k": options.get("k", 32), "steps": 10**6, "layer": 0}
    trainer = trainer_class(**settings, lm_name="-", device=str(batches[0].device), lr=LEARNING_RATE, warmup_steps=0)
    turn, count = _turns(batches), SimpleNamespace(steps=1)

    def step() -> None:
        trainer.update(count.steps, next(turn))
        count.steps += 1

    return step


_MAKERS: dict[str, Callable[..., Callable[[], object] | None]] = {
    "sae_lens": _sae_lens,
    "sparsify": _sparsify,
    "dictionary_learning": _dictionary_learning,
}
