"""What concept, InfoNCE and cluster losses add to a step: ``python -m saekit_graph.step_benchmark``.

Three steps take turns: one on shuffled activations alone, one that also encodes 32 labelled sequences of 64 positions, and
one with the three losses on these sequences. Each is a whole optimiser step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch

from saekit import Activations, Registry, SequenceBatch, Step
from saekit.testing import make_step

D_IN, D_SAE, BATCH, SEQUENCES, LENGTH = 256, 4096, 2048, 32, 64
LOSSES = ("concept", "infonce", "cluster")


class Bench:
    """A topk SAE, its optimiser and the losses, prepared as a run would."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        self.x = torch.randn(BATCH, D_IN, generator=draws)
        made = make_step(d_in=D_IN, d_sae=D_SAE, options={"k": 32}, graph=True)
        self.sae, self.graph = made.sae, made.graph
        labels = (torch.arange(SEQUENCES) % 2).float()[:, None]
        x = torch.randn(SEQUENCES, LENGTH, D_IN, generator=draws)
        self.sequences = SequenceBatch(x, torch.ones(SEQUENCES, LENGTH, dtype=torch.bool), labels)
        source = SimpleNamespace(concepts=["code"], sequences=lambda *_: self.sequences)
        context: Any = SimpleNamespace(source=source, sae=self.sae, seed=0)
        registry = Registry()
        self.losses = [registry.find("loss", name).build({}) for name in LOSSES]
        for loss in self.losses:
            loss.prepare(context)
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=1e-3, fused=True)

    def step(self, *, encode: bool, pooled: bool) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.optimiser.zero_grad()
        step = Step.of(self.sae, Activations(self.x), graph=self.graph)
        total = step.error.square().mean()
        if encode:
            s = self.sequences
            own = self.sae.encode(s.x[s.mask])
            step.sequences = SequenceBatch(s.x, s.mask, s.labels, code=own)
            total = total + 0.1 * own.sum().mean()  # so that its backward pass is timed even without a loss
        if pooled:
            total = total + 0.1 * sum(loss(step) for loss in self.losses)
        total.backward()
        self.optimiser.step()
        return time.perf_counter() - began


def main() -> None:
    """Print medians, and the three losses' step over the one that encodes."""
    parser = argparse.ArgumentParser(description="What the losses on sequences add to a step.")
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    bench = Bench()
    cases = {"plain": (False, False), "encoding": (True, False), "three losses": (True, True)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 3):  # the first three do not count
        for name, (encode, pooled) in cases.items():
            took = bench.step(encode=encode, pooled=pooled)
            if number >= 3:
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name}: {1000 * value:.1f} ms")
    print(f"three losses over encoding: {medians['three losses'] / medians['encoding']:.2f}")


if __name__ == "__main__":
    main()
