"""Does an SAE that is trained beside a model follow it? Prints a table for docs/online.md.

    python docs/examples/online/follow.py --seed 0

A classifier learns for 6,000 steps on sparse combinations of planted factors. An SAE on its hidden layer has a step for each of its
steps. Every 500 steps, both it and a copy that was frozen at step 1,000 rebuild what the classifier has there now on inputs
that neither was trained on.
"""

from __future__ import annotations

import argparse
import json
import tempfile

import torch
from torch import Tensor, nn

import saekit

FACTORS, D_IN, D_HIDDEN, CLASSES, BATCH = 96, 64, 64, 48, 256
RUN_FILE = {
    "source": {"use": "pushed", "d_in": D_HIDDEN, "rows": 32_768, "fill": 8192},
    "architecture": {"use": "topk", "d_sae": 256, "k": 12},
    "loss": [{"use": "mse"}, {"use": "auxk", "weight": 0.03}],
    "training": {"batch_size": 512, "lr": 1e-3, "device": "cpu", "dead_after": 100_000},
}


class World:
    """Inputs that are sums of some of the factors, each with the classes of the factors' pairs that are in it."""

    def __init__(self, seed: int) -> None:
        self.draws = torch.Generator().manual_seed(seed)
        self.directions = torch.randn(FACTORS, D_IN, generator=self.draws) / D_IN**0.5
        self.pairs = torch.randint(FACTORS, (CLASSES, 2), generator=self.draws)

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """(inputs [n, D_IN], classes [n, CLASSES] of 0 and 1)."""
        there = torch.rand(n, FACTORS, generator=self.draws) < 0.1
        strength = there * (0.5 + torch.rand(n, FACTORS, generator=self.draws))
        return strength @ self.directions, (there[:, self.pairs[:, 0]] | there[:, self.pairs[:, 1]]).float()


def explained_variance(sae: saekit.SparseAutoencoder, x: Tensor) -> float:
    """The share of the variance of x, [n, d], that the SAE's reconstruction keeps."""
    error = x - sae.reconstruct(x, sae.encode(x))
    return 1 - float(error.square().sum() / (x - x.mean(0)).square().sum())


def follow(seed: int, steps: int, every: int, freeze_at: int) -> list[dict[str, float]]:
    """One line for every `every` steps of the classifier."""
    torch.manual_seed(seed)
    world = World(seed)
    unseen = world.batch(4096)
    encoder = nn.Sequential(nn.Linear(D_IN, 256), nn.ReLU(), nn.Linear(256, D_HIDDEN))
    head = nn.Sequential(nn.ReLU(), nn.Linear(D_HIDDEN, CLASSES))
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3)
    overrides = {"training.tokens": steps * 512, "training.seed": seed}
    lines = []
    with tempfile.TemporaryDirectory() as place, saekit.Online(RUN_FILE, overrides=overrides, directory=f"{place}/run") as online:
        for step in range(1, steps + 1):
            x, classes = world.batch(BATCH)
            hidden = encoder(x)
            loss = nn.functional.binary_cross_entropy_with_logits(head(hidden), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            online.push(hidden)
            online.step()
            with torch.no_grad():
                if step == freeze_at:
                    frozen, then = online.sae(), encoder(unseen[0])
                if step >= freeze_at and step % every == 0:
                    now = encoder(unseen[0])
                    lines.append(
                        {
                            "step": step,
                            "loss": round(float(loss.detach()), 4),
                            "moved": round(float((now - then).norm() / then.norm()), 3),
                            "online": round(explained_variance(online.sae(), now), 4),
                            "frozen": round(explained_variance(frozen, now), 4),
                        }
                    )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("seed", 0), ("steps", 6000), ("every", 500), ("freeze-at", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for line in follow(**vars(parser.parse_args())):
        print(json.dumps(line))
