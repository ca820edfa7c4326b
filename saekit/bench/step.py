"""A training step against its floor: the encoder's dense product, [batch, d_in] x [d_in, d_sae]."""

from __future__ import annotations

from typing import Any

import torch

from saekit.activations.batch import Activations
from saekit.bench.peers import peer_steps
from saekit.bench.timing import alternate
from saekit.config import TrainingConfig
from saekit.listeners import Listeners
from saekit.runner.plan import Plan
from saekit.training.losses import Term
from saekit.training.trainer import Trainer


def time_step(
    plan: Plan, device: torch.device, *, d_in: int, batch: int, rounds: int, peers: bool = False
) -> dict[str, Any]:
    """Seconds of a whole optimiser step (losses, backward, Adam, decoder norms, statistics) and of the bare product.

    peers: time the same step by other installed libraries too, in turns with ours."""
    d_sae = plan.config.architecture.d_sae
    assert d_sae is not None
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(batch, d_in, generator=generator).to(device) for _ in range(4)]
    weight = torch.randn(d_sae, d_in, generator=generator).t().to(device)  # [d_in, d_sae], latent-major as in the SAE
    trainer = _trainer(plan, device, d_in, batch, batches[0])
    turn = iter(range(10**9))

    def step() -> None:
        trainer.train_on(Activations(batches[next(turn) % 4]))

    others = peer_steps(plan.architecture.component.name, plan.architecture.options, d_in, d_sae, batches) if peers else {}
    for warm_up in (step, *others.values()):
        for _ in range(3):
            warm_up()  # optimiser states exist, and the guard has seen every loss, before the clock runs
    trainer.guard = None
    timings = alternate({"product": lambda: batches[0] @ weight, "step": step, **others}, rounds, device)
    return {
        "architecture": plan.architecture.component.name,
        "d_in": d_in,
        "d_sae": d_sae,
        "batch": batch,
        "seconds": {name: timing.median for name, timing in timings.items()},
        "products": {name: t.over(timings["product"]) for name, t in timings.items() if name != "product"},
        "threads": torch.get_num_threads(),
    }


def _trainer(plan: Plan, device: torch.device, d_in: int, batch: int, sample: torch.Tensor) -> Trainer:
    sae = plan.architecture.build(d_in, plan.config.architecture.d_sae)
    sae.initialise(torch.Generator().manual_seed(0), sample.cpu())
    sae.to(device)
    terms = [Term(p.label, p.build(), p.entry.weight, p.component) for p in plan.losses]  # type: ignore[attr-defined]
    config = TrainingConfig(**{**plan.config.training.model_dump(), "batch_size": batch, "tokens": batch * 10**6})
    return Trainer(sae, terms, config, total_steps=10**6, scale=1.0, device=device, listeners=Listeners())
