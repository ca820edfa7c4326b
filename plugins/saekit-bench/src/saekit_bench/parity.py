"""Explained variance at equal L0 beside sae_lens's own trainer: the same activations, in the same order.

Each architecture is trained at a few sparsities, by saekit and by sae_lens, on activations of the run file's source
that are harvested once and scaled to a mean norm of sqrt(d_in) for both. Both get one schedule (warm-up, constant, decay
over the last fifth) and the same bound on the gradient's norm; each side has its own learning rate, from a small sweep
with a seed that is not reported (docs/performance.md says what it covered). Both are measured on held-out documents, in
the form that they save for inference. Explained variances are compared where both curves over L0 are known, interpolated
in log L0.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.activations.batch import Activations
from saekit.config import TrainingConfig
from saekit.listeners import Listeners
from saekit.plugins import Registry
from saekit.runner.plan import SAEPlan
from saekit.sae.base import SparseAutoencoder
from saekit.seeds import seed_for
from saekit.training.loss_terms import Term
from saekit.training.trainer import Trainer
from saekit_bench.peers import sae_lens_sae, sae_lens_trainer

WARMUP, DECAY = 50, 0.2
"""Steps of warm-up, and the last share of the run in which the learning rate falls to zero, for both sides."""
DEAD_AFTER = 100_000
"""Activations without firing after which a latent counts as dead, for both sides."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison. knob: the option, or the loss's weight (`loss.NAME`), whose `values` set the sparsity."""

    knob: str
    values: tuple[float, ...]
    lr: float
    losses: tuple[tuple[str, dict[str, Any], float], ...] = ()


@dataclass(frozen=True)
class Case:
    """An architecture of saekit beside its counterpart in sae_lens."""

    ours: Side
    peer: str
    theirs: Side


Weighted = tuple[str, dict[str, Any], float]
MSE: Weighted = ("mse", {}, 1.0)
AUXK: Weighted = ("auxk", {}, 1 / 32)
GATED: tuple[Weighted, ...] = (MSE, ("gated_aux", {}, 1.0))
K, L1, L0 = (16, 32, 64), (0.8, 1.5, 2.5), (0.5, 1.0, 2.0)

CASES = {
    "topk": Case(Side("k", K, 5e-3, (MSE, AUXK)), "topk", Side("k", K, 5e-3)),
    "batchtopk": Case(Side("k", K, 8e-3, (MSE, AUXK)), "batchtopk", Side("k", K, 5e-3)),
    "jumprelu": Case(Side("loss.l0", L0, 2.5e-3, (MSE,)), "jumprelu", Side("l0_coefficient", (0.2, 0.35, 0.6), 5e-3)),
    "standard": Case(Side("loss.l1", L1, 5e-3, (MSE,)), "standard", Side("l1_coefficient", L1, 5e-3)),
    "clipped": Case(Side("loss.l1", L1, 5e-3, (MSE,)), "standard", Side("l1_coefficient", L1, 5e-3)),
    "gated": Case(
        Side("loss.gate_l1", (2.0, 4.0, 7.0), 2.5e-3, GATED), "gated", Side("l1_coefficient", (0.7, 1.2, 2.5), 5e-3)
    ),
    "matryoshka": Case(Side("k", K, 5e-3, (("matryoshka", {}, 1.0), AUXK)), "matryoshka", Side("k", K, 5e-3)),
}
"""What is compared. sae_lens has no `clipped`, which is compared with its standard. The weights of penalties are in
sae_lens's units: it sums the squared error over the coordinates, where saekit averages, so that saekit's weight is the same
number over d_in."""


@dataclass
class Data:
    """Activations that both sides see, scaled: train [n, d_in], held_out [m, d_in]."""

    train: Tensor
    held_out: Tensor

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.train.shape[1]


def harvest(plan: SAEPlan, tokens: int, held_out: int) -> Data:
    """Shuffled training activations and held-out ones of the plan's source."""
    source = plan.build_source()
    source.open(device=torch.device("cpu"), dtype=torch.float32)
    train = _rows(source.blocks("train", size=65_536, seed=0), tokens)
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    test = _rows(source.blocks("held_out", size=65_536, seed=0), held_out)
    scale = train.shape[1] ** 0.5 / float(train[:16_384].norm(dim=1).mean())
    return Data(train * scale, test * scale)


def _rows(blocks: Iterator[Activations], wanted: int) -> Tensor:
    rows, count = [], 0
    for block in blocks:
        rows.append(block.x)
        count += len(block)
        if count >= wanted:
            break
    return torch.cat(rows)[:wanted]


Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x [batch, d_in] to (its reconstruction [batch, d_in], the number of active latents of each row [batch])."""


def of_saekit(sae: SparseAutoencoder) -> Reconstruct:
    """The reconstruction by an SAE of saekit."""

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        code = sae.encode(x)
        return sae.reconstruct(x, code), code.count()

    return reconstruct


def of_sae_lens(saved: Any) -> Reconstruct:
    """The reconstruction by an SAE of sae_lens, in the form that it saves for inference."""

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = saved.encode(x)
        return saved.decode(latents), (latents > 0).sum(1)

    return reconstruct


@torch.no_grad()
def quality(reconstruct: Reconstruct, held_out: Tensor) -> tuple[float, float]:
    """(explained variance, mean L0) over held_out [n, d_in]."""
    error = active = 0.0
    for x in held_out.split(4096):
        rebuilt, count = reconstruct(x)
        error += float((x - rebuilt).square().sum())
        active += float(count.sum())
    return 1 - error / float((held_out - held_out.mean(0)).square().sum()), active / len(held_out)


def train_ours(
    architecture: str, side: Side, value: float, seed: int, *, data: Data, d_sae: int, batch: int, registry: Registry
) -> tuple[float, float]:
    """(explained variance, L0) of saekit's SAE."""
    steps = len(data.train) // batch
    options = {} if side.knob.startswith("loss.") else {side.knob: value}
    component = registry.find("architecture", architecture)
    sae = component.build(component.validate(options, "architecture"), data.d_in, d_sae)
    sae.initialise(torch.Generator().manual_seed(seed_for(seed, "weights")), data.train[:16_384])
    terms = [_term(registry, name, opts, weight) for name, opts, weight in side.losses]
    if side.knob.startswith("loss."):
        terms.append(_term(registry, side.knob.removeprefix("loss."), {}, value / data.d_in))
    schedule = {"schedule": "warmup_decay", "to": side.lr, "warmup": WARMUP, "decay": DECAY}
    settings: dict[str, Any] = {
        "tokens": steps * batch,
        "batch_size": batch,
        "lr": schedule,
        "seed": seed,
        "dead_after": DEAD_AFTER,
    }
    config = TrainingConfig(**settings, clip=1.0 / data.d_in)
    device = torch.device("cpu")
    trainer = Trainer(sae, terms, config, total_steps=steps, scale=1.0, device=device, listeners=Listeners())
    for x in data.train[: steps * batch].split(batch):
        trainer.train_on(Activations(x))
    sae.eval()
    return quality(of_saekit(sae), data.held_out)


def _term(registry: Registry, name: str, options: dict[str, Any], weight: float) -> Term:
    component = registry.find("loss", name)
    return Term(name, component.build(component.validate(options, f"loss.{name}")), weight, component)


def train_theirs(
    peer: str, side: Side, value: float, seed: int, *, data: Data, d_sae: int, batch: int
) -> tuple[float, float]:
    """(explained variance, L0) of sae_lens's SAE, trained by its `SAETrainer` and read back as it saves it."""
    from sae_lens import SAE

    steps = len(data.train) // batch
    torch.manual_seed(seed)
    options: dict[str, Any] = {side.knob: value}
    if peer == "matryoshka":
        options["matryoshka_widths"] = [d_sae // part for part in (16, 8, 4, 2, 1)]
    sae = sae_lens_sae(peer, options, data.d_in, d_sae, "cpu")
    schedule: dict[str, Any] = {"lr_end": side.lr, "lr_warm_up_steps": WARMUP, "lr_decay_steps": int(DECAY * steps)}
    window: dict[str, Any] = {"dead_feature_window": max(1, DEAD_AFTER // batch)}
    batches = iter(data.train[: steps * batch].split(batch))
    trainer = sae_lens_trainer(sae, batches, steps * batch, batch, side.lr, **schedule, **window)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        trainer.fit()
    with tempfile.TemporaryDirectory() as directory:
        sae.save_inference_model(directory)
        saved = SAE.load_from_disk(directory)
    return quality(of_sae_lens(saved), data.held_out)


def compare(
    plan: SAEPlan,
    registry: Registry,
    *,
    architectures: Sequence[str],
    seeds: int,
    tokens: int,
    held_out: int,
    batch: int,
    rows: Path,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Train what `rows`, a JSONL file, does not contain yet, and return its rows. So an interrupted comparison resumes."""
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    d_sae = plan.config.architecture.d_sae
    assert d_sae is not None
    shared: dict[str, Any] = {"data": harvest(plan, tokens, held_out), "d_sae": d_sae, "batch": batch}
    for architecture in architectures:
        case = CASES[architecture]
        for seed, (who, side) in product(range(seeds), (("saekit", case.ours), ("sae_lens", case.theirs))):
            for value in side.values:
                key = {"architecture": architecture, "who": who, "value": value, "lr": side.lr, "seed": seed}
                if any(key.items() <= row.items() for row in done):
                    continue
                began = time.perf_counter()
                if who == "saekit":
                    ev, l0 = train_ours(architecture, side, value, seed, registry=registry, **shared)
                else:
                    ev, l0 = train_theirs(case.peer, side, value, seed, **shared)
                row = {**key, "explained_variance": ev, "l0": l0, "seconds": time.perf_counter() - began}
                with rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                done.append(row)
                report(f"{architecture} {who} {value:g}, seed {seed}: {ev:.4f} at L0 {l0:.1f}, {row['seconds']:.0f} s")
    return done


def summarise(rows: list[dict[str, Any]], architecture: str) -> list[dict[str, Any]]:
    """Both explained variances at the lowest, the middle and the highest L0 that both curves of a seed reach, and the
    difference with its range over the seeds."""
    seeds = sorted({row["seed"] for row in rows if row["architecture"] == architecture})
    places: list[list[tuple[float, float, float]]] = [[], [], []]  # (L0, ours, theirs) of each seed
    for seed in seeds:
        ours, theirs = (_curve(rows, architecture, who, seed) for who in ("saekit", "sae_lens"))
        if len(ours) < 2 or len(theirs) < 2:
            continue
        low, high = max(ours[0][0], theirs[0][0]), min(ours[-1][0], theirs[-1][0])
        if low > high:
            continue  # the two curves share no L0
        for place, at in zip(places, (low, (low + high) / 2, high), strict=True):
            place.append((math.exp(at), _at(ours, at), _at(theirs, at)))
    return [
        {
            "architecture": architecture,
            "l0": statistics.mean(l0 for l0, _, _ in place),
            "saekit": statistics.mean(a for _, a, _ in place),
            "sae_lens": statistics.mean(b for _, _, b in place),
            "difference": statistics.mean(a - b for _, a, b in place),
            "lowest": min(a - b for _, a, b in place),
            "highest": max(a - b for _, a, b in place),
            "seeds": len(place),
        }
        for place in places
        if place
    ]


def _curve(rows: list[dict[str, Any]], architecture: str, who: str, seed: int) -> list[tuple[float, float]]:
    """(log L0, explained variance) of one side, by rising L0."""
    wanted = {"architecture": architecture, "who": who, "seed": seed}.items()
    return sorted((math.log(row["l0"]), row["explained_variance"]) for row in rows if wanted <= row.items())


def _at(curve: list[tuple[float, float]], at: float) -> float:
    """The curve's value at log L0 = `at`, linear between its points."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if at <= x1 + 1e-12:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return curve[-1][1]
