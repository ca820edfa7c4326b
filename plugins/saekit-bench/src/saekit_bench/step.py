"""A training step against its floor: the encoder's dense product, [batch, d_in] x [d_in, d_sae]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saekit.activations.batch import Activations
from saekit.config import TrainingConfig
from saekit.listeners import Listeners
from saekit.runner.plan import SAEPlan
from saekit.training.loss_terms import Term
from saekit.training.trainer import Trainer
from saekit_bench.memory import PeakMemory
from saekit_bench.peers import LEARNING_RATE, peer_steps
from saekit_bench.timing import alternate

WARM_UP = 20
"""Steps before timing: the optimiser has its state, the guard has seen every loss, the gates have become sparse."""


def time_step(
    plan: SAEPlan,
    device: torch.device,
    *,
    d_in: int,
    batch: int,
    rounds: int,
    peers: bool = False,
    l0: float | None = None,
) -> dict[str, Any]:
    """Seconds of a whole optimiser step (losses, backward, Adam, decoder norms, statistics) and of the bare product.

    peers: also time the same step by other installed libraries, in turns with ours.
    l0: lower the encoder's bias before the first step until a row has this many active latents, as in a trained SAE;
        for gates that do not count latents."""
    d_sae = plan.config.architecture.d_sae
    assert d_sae is not None
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(batch, d_in, generator=generator).to(device) for _ in range(4)]
    weight = torch.randn(d_sae, d_in, generator=generator).t().to(device)  # [d_in, d_sae], latent-major as in the SAE
    trainer = _trainer(plan, device, d_in, batch, batches[0])
    bias = None if l0 is None else _lower_bias(trainer, batches[0], l0)
    turn = iter(range(10**9))

    def step() -> None:
        trainer.train_on(Activations(batches[next(turn) % 4]))

    for _ in range(WARM_UP):
        step()
    trainer.guard = None
    trainer.optimizer.zero_grad(set_to_none=True)
    del trainer.step  # its batch would count as memory of the next
    with PeakMemory(device) as memory:
        step()
    others = {}
    if peers:
        name, options = plan.architecture.component.name, plan.architecture.options
        others = peer_steps(name, options, d_in, d_sae, batches, bias)
        for other in others.values():
            for _ in range(3):
                other()
    timings = alternate({"product": lambda: batches[0] @ weight, "step": step, **others}, rounds, device)
    step_after = trainer.step
    return {
        "architecture": plan.architecture.component.name,
        "d_in": d_in,
        "d_sae": d_sae,
        "batch": batch,
        "l0": float(step_after.code.count().mean()),
        "seconds": {name: timing.median for name, timing in timings.items()},
        "products": {name: t.over(timings["product"]) for name, t in timings.items() if name != "product"},
        "peak_memory_in_pre_activations": memory.bytes and memory.bytes / (4 * batch * d_sae),
        "threads": torch.get_num_threads(),
    }


@torch.no_grad()
def _lower_bias(trainer: Trainer, x: Tensor, l0: float) -> float:
    """Lower every latent's bias alike until a row of x has `l0` active latents on average; gives the bias."""
    sae = trainer.sae
    low, high, bias = -64.0, 0.0, 0.0
    for _ in range(30):
        middle = (low + high) / 2
        sae.shift_pre_activations(middle - bias)
        bias = middle
        if float(sae.encode(x[:256]).count().mean()) > l0:
            high = middle
        else:
            low = middle
    return low


def _trainer(plan: SAEPlan, device: torch.device, d_in: int, batch: int, sample: Tensor) -> Trainer:
    sae = plan.architecture.build(d_in, plan.config.architecture.d_sae)
    sae.initialise(torch.Generator().manual_seed(0), sample.cpu())
    sae.to(device)
    terms = [Term(p.label, p.build(), p.entry.weight, p.component) for p in plan.sections["loss"]]  # type: ignore[attr-defined]
    own = plan.config.training.model_dump()
    config = TrainingConfig(**{**own, "batch_size": batch, "tokens": batch * 10**6, "lr": LEARNING_RATE})
    return Trainer(sae, terms, config, total_steps=10**6, scale=1.0, device=device, listeners=Listeners())
