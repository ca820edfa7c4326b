"""What `groups` costs at its default interval: ``python -m saekit_unlearning.groups_benchmark``.

A topk SAE of 16,384 latents of which 32 are active, 768 wide, batches of 2,048: some steps are timed, then one look at the codes
of the last 8 steps. In a run there is one look in 100 steps.
"""

from __future__ import annotations

import resource
import statistics
import time

import torch
from saekit_graph.clusters import correlated_pairs

from saekit import Activations, Pattern, SparseCode, Step
from saekit.testing import make_step
from saekit_unlearning.groups import Groups, grouped

D_IN, D_SAE, ACTIVE, BATCH = 768, 16_384, 32, 2048


def planted_codes(batches: int, draws: torch.Generator) -> list[SparseCode]:
    """Codes in which half of a row's latents come from two blocks of eight, and the others are frequent or rare."""
    codes = []
    for _ in range(batches):
        blocks = torch.randint(0, D_SAE // 16, (BATCH, 2), generator=draws)
        together = (blocks[:, :, None] * 8 + torch.arange(8)).flatten(1)  # [batch, 16]
        size = D_SAE // 2 // 16
        alone = D_SAE // 2 + torch.arange(16) * size + (size * torch.rand(BATCH, 16, generator=draws) ** 3).long()
        latents = torch.cat([together, alone], 1)
        codes.append(SparseCode(Pattern.regular(latents, D_SAE), torch.rand(latents.numel(), generator=draws)))
    return codes


def main() -> None:
    """Print seconds and memory."""
    draws = torch.Generator().manual_seed(0)
    sae = make_step(d_in=D_IN, d_sae=D_SAE, options={"k": ACTIVE}, batch=8).sae
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    seconds = []
    for _ in range(4):
        x = torch.randn(BATCH, D_IN, generator=draws)
        began = time.perf_counter()
        optimiser.zero_grad()
        Step.of(sae, Activations(x)).error.square().mean().backward()
        optimiser.step()
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[1:])
    defaults = Groups()
    codes = planted_codes(defaults.batches, draws)
    few = correlated_pairs(iter(codes[:1]), D_SAE, visits=1 << 16)
    grouped(few, percentile=99, minimum=2)  # imports what it needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    pairs = correlated_pairs(iter(codes), D_SAE, least=defaults.least)
    paired = time.perf_counter() - began
    found = grouped(pairs, percentile=defaults.percentile, minimum=defaults.minimum, clusters=32)
    look = time.perf_counter() - began
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"a step: {step:.2f} s; a look: {look:.2f} s ({paired:.2f} s for {len(pairs):,} pairs of {pairs.tokens:,} activations)")
    print(f"of a run at one look in {defaults.every} steps: {look / (defaults.every * step):.1%}; peak rise {rise:.2f} GB")
    print(f"{found.group.max() + 1} groups of {(found.group >= 0).sum()} latents, above {found.applied:.3f}")


if __name__ == "__main__":
    main()
