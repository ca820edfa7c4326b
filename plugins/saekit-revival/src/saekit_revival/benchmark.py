"""What `usage_kl` adds to a training step: ``python -m saekit_revival.benchmark``.

Two SAEs with the same weights and batches take turns: one step without the loss, one with it. Printed is the median of the paired
ratios with its quartiles, for each architecture at an L0 of about 32. docs/revival.md says what they may be.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from saekit import Activations, SparseAutoencoder, Step
from saekit.testing import make_step
from saekit_revival.usage_kl import UsageKL

ACTIVE = 32
ARCHITECTURES = {"topk": {"k": ACTIVE}, "batchtopk": {"k": ACTIVE}, "standard": {}, "jumprelu": {}, "gated": {}}
WARM_UP = 20
"""Steps before timing: the optimisers have their state, and gates that start dense have become sparse."""


def main() -> None:
    """Print a table of paired ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=[*ARCHITECTURES], action="append", help="Only this one (may be repeated).")
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if min(given.d_in, given.d_sae, given.batch, given.rounds) < 1 or given.d_sae < ACTIVE:
        parser.error(f"sizes and rounds must be at least 1, and --d-sae at least {ACTIVE}")
    print(f"d_in {given.d_in}, d_sae {given.d_sae}, batch {given.batch}, {torch.get_num_threads()} threads")
    for architecture in given.architecture or ARCHITECTURES:
        ratios, seconds = paired(architecture, given.d_in, given.d_sae, given.batch, given.rounds)
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        print(f"{architecture:10} {seconds:.3f} s a step without; with usage_kl {median:.2f} times ({low:.2f} to {high:.2f})")


def paired(architecture: str, d_in: int, d_sae: int, batch: int, rounds: int) -> tuple[list[float], float]:
    """(the ratio of each round's step with the loss to that without, median seconds without)."""
    draws = torch.Generator().manual_seed(0)
    xs = [torch.randn(batch, d_in, generator=draws) for _ in range(4)]
    without, with_it = (_step(_sae(architecture, d_in, d_sae, xs[0]), loss) for loss in (None, UsageKL(target=ACTIVE / d_sae)))
    for number in range(WARM_UP):
        without(xs[number % 4])
        with_it(xs[number % 4])
    plain, ratios = [], []
    for number in range(rounds):
        order = (without, with_it) if number % 2 else (with_it, without)
        took = {step: _seconds(step, xs[number % 4]) for step in order}
        plain.append(took[without])
        ratios.append(took[with_it] / took[without])
    return ratios, statistics.median(plain)


def _seconds(step: Callable[[Tensor], None], x: Tensor) -> float:
    began = time.perf_counter()
    step(x)
    return time.perf_counter() - began


def _sae(architecture: str, d_in: int, d_sae: int, x: Tensor) -> SparseAutoencoder:
    """An SAE with about `ACTIVE` active latents in a row."""
    sae = make_step(architecture=architecture, options=ARCHITECTURES[architecture], d_in=d_in, d_sae=d_sae, batch=8).sae
    if sae.l0_option is None:
        with torch.no_grad():
            margin = sae.encode(x[:64]).margin()
            sae.shift_pre_activations(-float(margin.flatten().topk(ACTIVE * len(margin)).values[-1]))
    return sae


def _step(sae: SparseAutoencoder, loss: UsageKL | None) -> Callable[[Tensor], None]:
    """A step of training: encode, decode, losses, backward, Adam, decoder norms. The rate is too low to change the L0."""
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-9, fused=True)

    def step(x: Tensor) -> None:
        optimiser.zero_grad()
        seen = Step.of(sae, Activations(x))
        total = seen.error.square().mean()
        if loss:
            total = total + 1e-3 * loss(seen)
        total.backward()
        sae.constrain_gradients()
        optimiser.step()
        sae.constrain_weights()

    return step


if __name__ == "__main__":
    main()
