"""The graph of each latent's top-k neighbours by a measure of similarity between latents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from saekit import FeatureGraph, SparseAutoencoder

Neighbours = Annotated[int, Field(gt=0, description="The most neighbours of each latent.")]
"""The type of the option `k` of a builder."""
Above = Annotated[float, Field(ge=0, description="An edge only if the measure is above this.")]
"""The type of the option `above` of a builder."""


def top_k_graph(
    sae: SparseAutoencoder, blocks: Iterable[tuple[int, Tensor]], *, k: int, above: float = 0.0
) -> FeatureGraph:
    """The graph with an edge to each latent from the `k` latents with the largest measure.

    blocks: (first row, measure [rows, d_sae]), together one row for every latent; each block is overwritten, and only
        one is held at a time. There is an edge only if the measure exceeds `above`, and never from a latent to itself.
        Which of several neighbours with equal measures are taken is unspecified. Each latent's edges are contiguous,
        strongest first.
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
    """The number of rows of [d_sae] in a block of about `elements` numbers; at least one."""
    return max(1, min(d_sae, elements // d_sae))
