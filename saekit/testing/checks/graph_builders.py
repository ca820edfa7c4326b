"""What is asked of a graph builder, on the SAE of a finished tiny run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from saekit.graph import FeatureGraph
from saekit.sae.base import SparseAutoencoder
from saekit.sae.code import Code, SparseCode
from saekit.testing.checks import any_kind
from saekit.testing.checks.shared import changed, copied, seeded
from saekit.testing.fixtures import make_step
from saekit.testing.kit import Check, Failed, Subject
from saekit.testing.tiny import finished_run


def sae_of(subject: Subject) -> Any:
    """The SAE of a finished run that provides what the builder needs."""
    return finished_run(set(subject.component.needs) - {"graph"}, subject.registry).context.sae


def codes_of(sae: SparseAutoencoder, silent: bool = False) -> list[Code]:
    """Codes of a few batches, without gradients. silent: no latent is active in them."""
    with torch.no_grad():
        codes = [make_step(sae=sae, seed=seed).code for seed in range(4)]
    if silent:
        return [SparseCode(code.pattern, torch.zeros_like(code.values)) for code in codes if isinstance(code, SparseCode)]
    return codes


def graph_of(subject: Subject, sae: SparseAutoencoder, codes: list[Code]) -> Any:
    """What it builds."""
    stream: Iterator[Code] = iter(codes)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), seeded(0):
        torch.manual_seed(0)
        return subject.build()(sae, stream)


# --- the checks ------------------------------------------------------------------------------------------------


def gives_a_graph(subject: Subject) -> None:
    sae = sae_of(subject)
    graph = graph_of(subject, sae, codes_of(sae))
    if not isinstance(graph, FeatureGraph):
        raise Failed(f"it returns {type(graph).__name__}. Return FeatureGraph.of(sae, edge_index, weight).")
    graph.require(sae)
    if not bool(torch.isfinite(graph.weight).all()):
        raise Failed("some of its weights are not finite. Guard the division by what may be zero.")


def dead_latents(subject: Subject) -> None:
    sae = sae_of(subject)
    graph = graph_of(subject, sae, codes_of(sae, silent=True))
    if isinstance(graph, FeatureGraph) and not bool(torch.isfinite(graph.weight).all()):
        raise Failed("if no latent fires, some of its weights are not finite. Leave such latents without edges.")


def deterministic(subject: Subject) -> None:
    sae = sae_of(subject)
    if graph_of(subject, sae, codes_of(sae)) != graph_of(subject, sae, codes_of(sae)):
        raise Failed("the same SAE and codes give another graph the second time. Draw from a generator with a fixed seed.")


def inputs_unchanged(subject: Subject) -> None:
    sae = sae_of(subject)
    codes = codes_of(sae)
    before = copied(sae.state_dict()), copied(codes)
    graph_of(subject, sae, codes)
    if changed(before[0], copied(sae.state_dict())) or changed(before[1], copied(codes)):
        raise Failed("it changes the SAE or the codes in place. Work on a copy.")


CHECKS: tuple[Check, ...] = (
    *any_kind.CHECKS,
    Check("gives_a_graph", "It returns a `FeatureGraph` of the given SAE, with finite weights.", gives_a_graph),
    Check("dead_latents", "If no latent fires, every weight is finite.", dead_latents),
    Check("deterministic", "The same SAE and codes give the same graph.", deterministic),
    Check("inputs_unchanged", "It leaves the SAE and the codes as they were.", inputs_unchanged),
)
