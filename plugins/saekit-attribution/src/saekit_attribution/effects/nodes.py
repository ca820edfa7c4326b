"""The nodes that an effect is attributed to: latents of an SAE at some positions, and the SAE's error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saekit import SparseAutoencoder, Subject, own_numerics
from saekit_attribution.effects.logit_difference import LogitDifference
from saekit_attribution.labelled_data.teacher_forcing import Sample

Reference = Literal["zero", "base"]
Positions = Literal["decisive", "all"]

_PRODUCTS = 1 << 24  # numbers in a temporary of `products`


@dataclass
class Nodes:
    """Latents and errors of `n` samples at `P` positions, against their reference.

    x: [n, P, d], the activation.
    reference: [n, P, d], the activation with every node at its reference.
    error: [n, P, d], the SAE's error minus its reference. At positions that are not considered x equals reference and
        the error is zero; everywhere x = reference + error + the decoded deltas.
    rows, positions, latents: [E], the active entries, sorted by row, latent, position.
    values: [E], activations there.
    deltas: [E], values minus their reference.
    excess: [E], max(value - value in the base run, 0).
    node: [E], the node of each entry; node_rows, node_latents: [M].
    bounds: [M + 1], where each node's entries begin.
    """

    x: Tensor
    reference: Tensor
    error: Tensor
    rows: Tensor
    positions: Tensor
    latents: Tensor
    values: Tensor
    deltas: Tensor
    excess: Tensor
    node: Tensor
    node_rows: Tensor
    node_latents: Tensor
    bounds: Tensor

    def summed(self, entries: Tensor) -> Tensor:
        """The sum of `entries` [E] over each node: [M]."""
        return entries.new_zeros(len(self.node_rows)).index_add(0, self.node, entries)

    def products(self, gradient: Tensor, decoder: Tensor) -> Tensor:
        """The product of gradient [n, P, d] at each entry's place with its latent's decoder row: [E]. Builds no dense code."""
        step = max(1, _PRODUCTS // gradient.shape[2])
        parts = [
            (gradient[r, p] * decoder[latent]).sum(1)
            for r, p, latent in zip(
                self.rows.split(step), self.positions.split(step), self.latents.split(step), strict=True
            )
        ]
        return torch.cat(parts) if parts else gradient.new_zeros(0)

    def without(self, nodes: Tensor, decoder: Tensor) -> Tensor:
        """The activations with one node at its reference in each: nodes [m] -> [m, P, d]."""
        x = self.x[self.node_rows[nodes]]
        counts = self.bounds[nodes + 1] - self.bounds[nodes]
        which = torch.arange(len(nodes), device=nodes.device).repeat_interleave(counts)
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        entries = self.bounds[nodes].repeat_interleave(counts) + torch.arange(len(which), device=nodes.device) - first
        change = self.deltas[entries, None] * decoder[self.latents[entries]]
        return x.index_put((which, self.positions[entries]), -change, accumulate=True)


def nodes_of(
    subject: Subject,
    sae: SparseAutoencoder,
    samples: Sequence[Sample],
    metric: LogitDifference,
    *,
    positions: Positions,
    reference: Reference,
) -> Nodes:
    """The nodes of samples of equal length, at the site of `metric`."""
    activation, offset = metric.activation, metric.offset
    n, length = activation.shape[:2]
    considered = torch.zeros(n, length, dtype=torch.bool, device=activation.device)
    considered[:, -1] = True
    if positions == "all":
        tokens = torch.tensor([s.tokens for s in samples], device=activation.device)
        considered |= sae.trained_positions.with_bos(subject.bos_token_id).in_rows(tokens)
    base, known = base_activation(metric, samples, considered)
    wide = torch.promote_types(activation.dtype, sae.W_dec.dtype)
    x, base, considered, known = (t[:, offset:] for t in (activation.to(wide), base.to(wide), considered, known))
    places, base_places = considered.nonzero(), known.nonzero()  # [e, 2]
    code, error = _encoded(sae, x[considered])
    base_code, base_error = _encoded(sae, base[known])
    entries = _joined(code, places, base_code, base_places, width=length, d_sae=sae.d_sae)
    rows, latents, at, values, before = entries
    if reference == "zero":
        there = values != 0
        rows, latents, at, values, before = (t[there] for t in entries)
    bare = torch.where(considered[..., None], sae.b_dec.to(wide), x)
    errors = torch.zeros_like(x).masked_scatter(considered[..., None], error)
    deltas = values
    if reference == "base":
        bare = torch.where(known[..., None], base, bare)
        errors[known] -= base_error
        deltas = values - before
    keys, node, counts = torch.unique_consecutive(rows * sae.d_sae + latents, return_inverse=True, return_counts=True)
    return Nodes(
        x=x,
        reference=bare,
        error=errors,
        rows=rows,
        positions=at,
        latents=latents,
        values=values,
        deltas=deltas,
        excess=(values - before).clamp_min(0),
        node=node,
        node_rows=keys // sae.d_sae,
        node_latents=keys % sae.d_sae,
        bounds=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
    )


def base_activation(metric: LogitDifference, samples: Sequence[Sample], wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The base prompts' activations at aligned positions, [n, T, d] (zero elsewhere), and which those are, [n, T].

    Where both texts agree from the beginning, the samples' own activations are also the base's, by causality.
    wanted: [n, T], the positions of interest."""
    activation = metric.activation
    device = activation.device
    aligned = torch.tensor([s.aligned for s in samples], device=device)  # [n, T]
    shared = torch.tensor([common_prefix(s.tokens, s.base_tokens) for s in samples], device=device)
    here = torch.arange(activation.shape[1], device=device)
    known = wanted & (aligned >= 0)
    same = known & (aligned == here) & (here < shared[:, None])
    base = torch.where(same[..., None], activation, 0.0)
    missing = known & ~same
    groups: dict[tuple[int, int], list[int]] = {}
    # What both texts share may reach into the positions that are missing, where the inserted text begins as the rest does.
    first = torch.where(missing, aligned, activation.shape[1]).amin(1)
    for row in missing.any(1).nonzero().flatten().tolist():
        begun = min(int(shared[row]), int(first[row]))
        groups.setdefault((len(samples[row].base_tokens), begun), []).append(row)
    for (_, begun), chosen in groups.items():
        rows = torch.tensor(chosen, device=device)
        found, start = metric.base_activation([samples[row].base_tokens for row in chosen], rows, begun)  # [m, T' - start, d]
        which, at = missing[rows].nonzero(as_tuple=True)
        base[rows[which], at] = found[which, aligned[rows[which], at] - start]
    return base, known


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts share from the beginning."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def _encoded(sae: SparseAutoencoder, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(rows, latents, values) of the code of x [e, d], and what the SAE does not reconstruct, [e, d]."""
    with own_numerics(sae, x.device):
        code = sae.encode(x.to(sae.W_dec.dtype))
        error = x - sae.decode(code)
    return code.nonzero(), error


def _joined(
    code: tuple[Tensor, Tensor, Tensor],
    places: Tensor,
    base_code: tuple[Tensor, Tensor, Tensor],
    base_places: Tensor,
    *,
    width: int,
    d_sae: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The entries active in either run, sorted: rows, latents, positions, values here, values in the base run; [E] each.

    places, base_places: [e, 2], the row and the position of each row that was encoded."""
    keys = []
    for (index, latents, _), where in ((code, places), (base_code, base_places)):
        row, at = where[index].unbind(1)
        keys.append((row * d_sae + latents) * width + at)
    joined, inverse = torch.unique(torch.cat(keys), return_inverse=True)
    values = code[2].new_zeros(2, len(joined))
    values[0, inverse[: len(keys[0])]] = code[2]
    values[1, inverse[len(keys[0]) :]] = base_code[2]
    node, at = joined // width, joined % width
    return node // d_sae, node % d_sae, at, values[0], values[1]
