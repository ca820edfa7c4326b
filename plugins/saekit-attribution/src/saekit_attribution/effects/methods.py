"""How much of a logit difference each latent accounts for: by one gradient (`atp`), by several (`ig`), or exactly (`exact`).

All three work on the same nodes: the latents active at the considered positions, and the SAE's error as a separate
node. The undisturbed model computes with the original activation, so the SAE's error is never dropped (Marks et al. 2024,
"Sparse Feature Circuits", section 3).

Integrated gradients add up to the whole effect. That need not bring them closer to the effects of single latents: the
path begins far from the data, where the model's behaviour means little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from saekit import SparseAutoencoder, Subject
from saekit_attribution.effects.by_position import PositionScores, by_position
from saekit_attribution.effects.logit_difference import LogitDifference
from saekit_attribution.effects.nodes import Nodes, Positions, Reference, nodes_of
from saekit_attribution.labelled_data.teacher_forcing import Sample

Method = Literal["atp", "ig", "exact"]
METHODS: tuple[Method, ...] = ("atp", "ig", "exact")


@dataclass(frozen=True)
class Attribution:
    """One method's scores for one sample. Tensors are on the CPU; scores are in logits.

    latents: [m] int64, ascending: those active at the considered positions (for reference "base" also those active only
        in the base run).
    scores: [m], the part of `logit_diff` that each latent accounts for; positive promotes the target.
    activations: [m], summed over the considered positions.
    gradients: [m], of the metric with respect to the latent (for ig the mean along the path; over several positions
        score / activation, 0 where that is undefined); None for exact.
    weighted: [m], the scores with max(a - a_base, 0), the part of each activation that the base run lacks, in its place
        (a_base is 0 at unaligned positions): a latent that every answer needs is active in the base run too, and drops
        out. These are no longer effects; None for exact.
    error: the score of the SAE's error.
    logit_diff: logit(target) - logit(base) of the undisturbed model.
    moved: how far that falls when every node is at its reference; the scores of a complete method, with `error`, add up to it.
    by_position: the scores at each position, the largest alone; None where they were not asked for, and for exact, whose
        effects are of all positions at once.
    """

    latents: Tensor
    scores: Tensor
    activations: Tensor
    gradients: Tensor | None
    weighted: Tensor | None
    error: float
    logit_diff: float
    moved: float
    by_position: tuple[PositionScores, ...] | None = None


def batch_attributions(
    subject: Subject,
    sae: SparseAutoencoder,
    samples: list[Sample],
    methods: Sequence[str],
    positions: Positions,
    reference: Reference,
    steps: int,
    batch_tokens: int,
    per_position: int = 0,
) -> Iterator[dict[str, Attribution]]:
    """The attributions of samples that all have the same length, in their order.

    per_position: how many latents `Attribution.by_position` holds for each position; 0 for none."""
    metric = LogitDifference(subject, samples, last=positions == "decisive", batch_tokens=batch_tokens)
    with torch.no_grad():
        nodes = nodes_of(subject, sae, samples, metric, positions=positions, reference=reference)
    rows = torch.arange(len(samples), device=nodes.x.device)
    both = torch.stack([nodes.x, nodes.reference]).flatten(0, 1)
    plain, bare = metric.values(rows.repeat(2), lambda some: both[some]).chunk(2)
    moved = plain - bare
    compute: dict[str, Callable[[], _Scores]] = {
        "atp": lambda: _linear(nodes, sae, metric.gradient(rows, nodes.x)[1]),
        "ig": lambda: _linear(nodes, sae, _mean_gradient(metric, nodes, rows, steps)),
        "exact": lambda: _exact(metric, nodes, sae, rows, plain),
    }
    found = {method: compute[method]() for method in methods}
    counts = torch.bincount(nodes.node_rows, minlength=len(samples)).tolist()

    def split(values: Tensor | None) -> list[Any]:
        return [None] * len(samples) if values is None else list(values.detach().cpu().split(counts))

    latents, activations = split(nodes.node_latents), split(nodes.summed(nodes.values))
    differences, all_moved = plain.tolist(), moved.tolist()
    parts = {
        method: (
            split(of.scores),
            split(of.gradients),
            split(of.weighted),
            of.errors.sum(1).tolist(),
            [None] * len(samples)
            if of.entries is None or not per_position
            else by_position(nodes, of.entries, of.errors, most=per_position, offset=metric.offset),
        )
        for method, of in found.items()
    }
    for i in range(len(samples)):
        yield {
            method: Attribution(
                latents=latents[i],
                scores=scores[i],
                activations=activations[i],
                gradients=gradients[i],
                weighted=weighted[i],
                error=errors[i],
                logit_diff=differences[i],
                moved=all_moved[i],
                by_position=places[i],
            )
            for method, (scores, gradients, weighted, errors, places) in parts.items()
        }


class _Scores(NamedTuple):
    """A method's scores for all samples of a batch, see `Attribution`.

    scores, gradients, weighted: [M]. errors: [n, P], at each position, or [n, 1] over all. entries: [E], of each entry."""

    scores: Tensor
    gradients: Tensor | None
    weighted: Tensor | None
    errors: Tensor
    entries: Tensor | None


def _linear(nodes: Nodes, sae: SparseAutoencoder, gradient: Tensor) -> _Scores:
    """The scores by the metric's gradient [n, P, d] at the site.

    A latent's gradient is the site's gradient times its decoder row: the forward pass uses the original activation, the
    backward pass goes through the decoder."""
    gradient = gradient.to(nodes.x.dtype)
    products = nodes.products(gradient, sae.W_dec)
    entries = nodes.deltas * products
    scores = nodes.summed(entries)
    activations = nodes.summed(nodes.values)
    one = nodes.summed(torch.ones_like(products)) == 1
    ratio = torch.where(activations == 0, 0.0, scores / activations)
    gradients = torch.where(one, nodes.summed(products), ratio)
    weighted = nodes.summed(nodes.excess * products)
    return _Scores(scores, gradients, weighted, (gradient * nodes.error).sum(2), entries)


def _mean_gradient(metric: LogitDifference, nodes: Nodes, rows: Tensor, steps: int) -> Tensor:
    """The mean gradient on the straight line from the reference to the activation, by the midpoint rule: [n, P, d].

    The decoder is linear, so it is also the straight line of the latents and the error."""
    total = torch.zeros_like(nodes.x)
    for step in range(steps):
        share = (step + 0.5) / steps
        total += metric.gradient(rows, nodes.reference + share * (nodes.x - nodes.reference))[1]
    return total / steps


def _exact(metric: LogitDifference, nodes: Nodes, sae: SparseAutoencoder, rows: Tensor, plain: Tensor) -> _Scores:
    """The true effects of replacing one latent by its reference, [M], and of replacing the error, [n]."""
    changing = nodes.summed((nodes.deltas != 0).long()).nonzero().flatten()  # the others are at their reference already
    of = nodes.node_rows[changing]
    without = metric.values(of, lambda some: nodes.without(changing[some], sae.W_dec))
    scores = plain.new_zeros(len(nodes.node_rows)).index_copy(0, changing, plain[of] - without)
    errors = plain - metric.values(rows, lambda some: nodes.x[some] - nodes.error[some])
    return _Scores(scores, None, None, errors[:, None], None)
