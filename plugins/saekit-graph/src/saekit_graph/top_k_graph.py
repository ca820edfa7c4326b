"""From a measure of how much two latents have in common to the graph of each latent's strongest neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from saekit import FeatureGraph, SparseAutoencoder

Neighbours = Annotated[int, Field(gt=0, description="Neighbours of each latent, at most.")]
"""The type of the option `k` of a builder."""
Above = Annotated[float, Field(ge=0, description="An edge only where the measure is above this.")]
"""The type of the option `above` of a builder."""


def strongest(
    sae: SparseAutoencoder, blocks: Iterable[tuple[int, Tensor]], *, k: int, above: float = 0.0
) -> FeatureGraph:
    """The graph with an edge to each latent from the `k` latents that have most in common with it.

    blocks: (first row, measure [rows, d_sae]) until every latent has had its row once; each block is overwritten, and only
    one is held at a time. An edge stands only where the measure is above `above`, and never from a latent to itself. Of
    neighbours with equal measures, which are taken is left open. Each latent's edges stand together, strongest first.
    """
    k = min(k, sae.d_sae - 1)
    edges, weights = [], []
    for first, measure in blocks:
        if not k:
            break
        rows = torch.arange(len(measure), device=measure.device)
        measure[rows, first + rows] = -torch.inf
        values, neighbours = measure.topk(k, dim=1)  # [rows, k]
        kept = values > above
        centres = (first + rows).unsqueeze(1).expand(-1, k)
        edges.append(torch.stack([neighbours[kept], centres[kept]]))
        weights.append(values[kept].float())
        del measure
    if not edges:
        return FeatureGraph.of(sae, torch.empty(2, 0, dtype=torch.long), torch.empty(0))
    return FeatureGraph.of(sae, torch.cat(edges, 1), torch.cat(weights))


def rows_in_a_block(d_sae: int, elements: int) -> int:
    """How many rows of [d_sae] a block has that holds about `elements` numbers; at least one."""
    return max(1, min(d_sae, elements // d_sae))
