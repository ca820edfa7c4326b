"""What tests of a component need: a `Step` without a run, a known dictionary, a registry with your own components."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.component import Component
from saekit.errors import PluginError, UsageError, near_names
from saekit.hookspecs import hookimpl
from saekit.kinds import HOOKS, KINDS
from saekit.plugins import Plugin, Registry
from saekit.registered import RegisteredComponent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from saekit.activations.batch import SequenceBatch
    from saekit.graph import FeatureGraph
    from saekit.sae.base import SparseAutoencoder
    from saekit.sae.code import SparseCode
    from saekit.training.loss_input import Step

D_IN, D_SAE, CONCEPTS = 16, 64, 2
"""The widths of everything made here, and how many concepts its labels have."""


def make_step(
    *,
    sae: SparseAutoencoder | None = None,
    architecture: str = "topk",
    options: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
    batch: int = 32,
    d_in: int = D_IN,
    d_sae: int = D_SAE,
    sparse: bool = True,
    labels: bool | Tensor = False,
    tokens: bool = False,
    sequences: bool | Tensor = False,
    graph: bool = False,
    provided: Sequence[str] = (),
    dead: int = 0,
    number: int = 0,
    fraction: float = 0.0,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Step:
    """One batch of random activations through an SAE, with its gradient: what a loss or a metric is given.

    sae: the SAE; by default a new one of `architecture` with `options`.
    sparse: False gives the same code as a `DenseCode` (a dense code stays as it is).
    labels: True gives labels of two concepts, 0, 1 or NaN (unknown); a tensor [batch, n] is taken as it is. tokens: random ids.
    sequences: True gives 12 labelled sequences of up to 5 positions with their code; a tensor of labels [n, m] gives n.
    graph: each latent with the next three as neighbours.
    provided: what a callback provides: "groups" (eight latents each, the last quarter in none), "importance" (rising).
    dead: how many latents are marked dead.
    dtype: of activations and weights, float32 by default. The same arguments give the same step.
    """
    import torch

    from saekit.activations.batch import Activations
    from saekit.sae.code import DenseCode
    from saekit.training.loss_input import Step

    draws = torch.Generator().manual_seed(seed)
    if sae is not None:
        d_in, d_sae = sae.d_in, sae.d_sae
    x = torch.randn(batch, d_in, generator=draws)  # [batch, d_in]
    if sae is None:
        component = (registry or Registry()).find("architecture", architecture)
        sae = build_sae(component, options or {}, x, d_in=d_in, d_sae=d_sae)
    dtype = dtype or sae.W_dec.dtype
    sae, x = sae.to(device, dtype), x.to(device, dtype)
    target = torch.randn(batch, sae.d_out, generator=draws).to(device, dtype) if sae.transcoder else None
    if labels is True:
        labels = torch.randint(0, 3, (batch, CONCEPTS), generator=draws).to(dtype)
        labels = torch.where(labels == 2, torch.nan, labels).to(device)  # [batch, CONCEPTS]
    marked = torch.zeros(d_sae, dtype=torch.bool, device=device)
    marked[torch.randperm(d_sae, generator=draws)[:dead].to(device)] = True
    rows = Activations(
        x,
        target=target,
        labels=None if isinstance(labels, bool) else labels,
        tokens=torch.randint(0, 100, (batch,), generator=draws).to(device) if tokens else None,
    )
    step = Step.of(
        sae,
        rows,
        number=number,
        fraction=fraction,
        dead=marked,
        n_dead=dead,
        sequences=None if sequences is False else _sequences(sae, sequences, sparse, seed),
        graph=_ring(sae) if graph else None,
        provided={word: _PROVIDED[word](sae.d_sae).to(device) for word in provided},
    )
    if not sparse:
        step.code = DenseCode(step.code.dense(), step.code.pre, step.code.margin)
        step.reconstruction = sae.reconstruct(step.x, step.code)
    return step


def _groups(d_sae: int) -> Tensor:
    import torch

    latents = torch.arange(d_sae)
    return torch.where(latents < d_sae - d_sae // 4, latents // 8, -1)


def _importance(d_sae: int) -> Tensor:
    import torch

    return torch.linspace(0, 1, d_sae)


_PROVIDED = {"groups": _groups, "importance": _importance}


def _sequences(sae: SparseAutoencoder, labels: bool | Tensor, sparse: bool, seed: int) -> SequenceBatch:
    """Whole sequences of different lengths, and their code with its gradient; drawn separately from all else."""
    import torch

    from saekit.activations.batch import SequenceBatch
    from saekit.numerics import evaluating
    from saekit.sae.code import DenseCode

    draws = torch.Generator().manual_seed(seed + 1)
    if isinstance(labels, bool):
        labels = torch.randint(0, 3, (12, CONCEPTS), generator=draws).float()
        labels = torch.where(labels == 2, torch.nan, labels)  # [n, CONCEPTS]
        labels[:2] = torch.tensor([[0.0], [1.0]])  # both classes are there
    n, length, like = len(labels), 5, sae.W_dec
    x = torch.randn(n, length, sae.d_in, generator=draws).to(like)
    target = torch.randn(n, length, sae.d_out, generator=draws).to(like) if sae.transcoder else None
    mask = torch.arange(length) < torch.randint(1, length + 1, (n, 1), generator=draws)
    tokens = torch.randint(0, 100, (n, length), generator=draws).to(like.device)
    mask = mask.to(like.device)
    with evaluating(sae):
        code = sae.encode(x[mask])
    if not sparse:
        code = DenseCode(code.dense(), code.pre, code.margin)
    return SequenceBatch(x, mask, labels.to(like), tokens, target, code)


def _ring(sae: SparseAutoencoder) -> FeatureGraph:
    """A graph in which each latent has the next three as neighbours, with falling weights."""
    import torch

    from saekit.graph import FeatureGraph

    centre = torch.arange(sae.d_sae).repeat_interleave(3)
    neighbour = (centre + torch.arange(1, 4).repeat(sae.d_sae)) % sae.d_sae
    weight = torch.tensor([0.75, 0.5, 0.25]).repeat(sae.d_sae)
    return FeatureGraph.of(sae, torch.stack([neighbour, centre]), weight).to(sae.W_dec.device)


def build_sae(
    component: RegisteredComponent,
    options: Mapping[str, Any],
    sample: Tensor,
    *,
    d_in: int = D_IN,
    d_sae: int = D_SAE,
    d_out: int | None = None,
    seed: int = 0,
) -> SparseAutoencoder:
    """An SAE of an architecture with its first weights, ready for a first step. sample: [n, d_out], what it will rebuild.

    Unless `options` say otherwise, few latents are active: see `few_active`."""
    import torch

    given = {**few_active(component, min(8, d_sae)), **options}
    sae = component.build(component.validate(given, "architecture"), d_in, d_sae, d_out)
    sae.initialise(torch.Generator().manual_seed(seed), sample)
    sae.constrain_weights()
    return sae


def few_active(component: RegisteredComponent, l0: int = 8) -> dict[str, int]:
    """The options with which about `l0` latents of an architecture are active; none if no option sets that."""
    option = getattr(component.load(), "l0_option", None)
    return {} if option is None else {option: l0}


@dataclass(frozen=True)
class Truth:
    """Activations whose dictionary is known.

    directions: [n_features, d_in], of norm 1.
    x: [n, d_in], their sums and a little noise.
    code: the true code of x.
    labels: [n, 2], whether the first two features are active.
    """

    directions: Tensor
    x: Tensor
    code: SparseCode
    labels: Tensor


def synthetic_truth(*, n: int = 2048, d_in: int = D_IN, n_features: int = 32, seed: int = 0) -> Truth:
    """About `n` activations that are sparse sums of known directions, from the source `synthetic`."""
    import torch

    component = Registry().find("source", "synthetic")
    given = {"d_in": d_in, "n_features": n_features, "probability": 0.1, "concepts": [0, 1], "seed": seed}
    source = component.build(component.validate(given, "source"))
    source.open(device=torch.device("cpu"), dtype=torch.float32)
    block = next(source.blocks("train", size=n, seed=seed))
    code = next(source.codes("train", size=n, seed=seed))
    return Truth(source.truth, block.x, code, block.labels)


def registry_of(*, plugin: str = "in_memory", **components: Component | list[Component]) -> Registry:
    """The installed components together with these, by kind, as if one plugin had declared them.

    `registry_of(loss=Component("hoyer", hoyer))`: a target may be the object itself. They win over installed ones of the
    same name. PluginError for a component that no plugin may declare.
    """
    module = types.ModuleType(plugin)
    for kind, given in components.items():
        if kind not in KINDS:
            raise UsageError(f"registry_of: there is no kind {kind!r}.{near_names(kind, KINDS)} There are: {', '.join(KINDS)}.")
        declared = given if isinstance(given, list) else [given]
        setattr(module, HOOKS[kind], hookimpl(lambda declared=declared: declared))
    registry = Registry()
    found = Plugin(plugin, "in memory", "", file=Path(plugin))
    registry._add(found, lambda: module, set())
    if found.error:
        raise PluginError(found.error)
    return registry
