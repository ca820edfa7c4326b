"""The harvest against its floor: a bare forward through the same truncated model on the same rows of tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from saekit.activations.sites import run_to_site
from saekit.runner.plan import SAEPlan
from saekit_bench.timing import alternate


def time_harvest(plan: SAEPlan, device: torch.device, *, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of a block of `tokens` activations from the plan's source, and of the bare forward.

    The bare forward runs the model up to the hook point on prepared rows and keeps nothing. The harvest also takes its
    rows from the packed text, drops positions, and fills the block.
    """
    source = plan.source.build()
    source.open(device=device, dtype=torch.float32)
    seed = plan.config.training.seed
    block = next(source.blocks("train", size=tokens, seed=seed))
    rows = source.rows
    batches = []
    for batch in source.token_batches("train", rows=rows):
        batches.append(batch.tokens.to(device))
        if sum(b.numel() for b in batches) >= tokens:
            break
    model, site = source.subject.model, source.subject.site

    @torch.no_grad()
    def bare() -> None:
        for tokens_of_batch in batches:
            run_to_site(site, partial(model, tokens_of_batch))

    def harvest() -> None:
        next(source.blocks("train", size=tokens, seed=seed, start=1))

    timings = alternate({"bare": bare, "harvest": harvest}, rounds, device)
    positions = sum(b.numel() for b in batches)
    speed = {
        "bare": positions / timings["bare"].median,
        "harvest": _positions(source, block) / timings["harvest"].median,
    }
    return {
        "model": source.subject.name,
        "hook_point": source.hook_point,
        "tokens_per_second": speed,
        "ratio": speed["harvest"] / speed["bare"],
        "threads": torch.get_num_threads(),
    }


def _positions(source: Any, block: Any) -> int:
    """How many positions went through the model for a block, including those that it leaves out."""
    return len(block.sequence.unique()) * source.context
