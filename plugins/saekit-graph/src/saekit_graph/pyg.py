"""`FeatureGraph` to and from torch_geometric's `Data`, with the digest of the dictionary that it was built from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from saekit import FeatureGraph, UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Data


def to_pyg(graph: FeatureGraph, x: Tensor | None = None) -> Data:
    """The graph as torch_geometric's `Data`: `edge_index` [2, E] from neighbour to centre, `edge_weight` [E], `num_nodes`.

    x: [nodes, n] features of the latents, if there are any. `dictionary` and `builder` go along, so that `from_pyg` gives
    back a graph that still knows which SAE it is of.
    """
    from torch_geometric.data import Data

    if x is not None and len(x) != graph.nodes:
        raise ValueError(f"x has {len(x)} rows, but the graph has {graph.nodes} latents: one row for each.")
    return Data(
        x=x,
        edge_index=graph.edge_index,
        edge_weight=graph.weight,
        num_nodes=graph.nodes,
        dictionary=graph.dictionary,
        builder=graph.builder,
    )


def from_pyg(data: Data) -> FeatureGraph:
    """The graph of what `to_pyg` gave, also after torch_geometric's transforms.

    Edges without a weight have weight 1. UsageError where `data` has no edges or does not say of which dictionary it is;
    ValueError where the shapes do not fit."""
    if data.edge_index is None:
        raise UsageError("this Data has no edge_index, so it is no graph. Set data.edge_index, [2, E].")
    dictionary = data.get("dictionary")
    if not isinstance(dictionary, str):
        raise UsageError(
            "this Data does not say which dictionary it is of, so a stale graph could not be told from a fresh one. Set "
            "data.dictionary = graph.dictionary of the graph that it came from, or make it with FeatureGraph.of(sae, ...)."
        )
    weight = data.get("edge_weight")
    if weight is None:
        weight = torch.ones(data.edge_index.shape[1], device=data.edge_index.device)
    nodes = data.num_nodes
    if nodes is None:
        raise UsageError("this Data does not say how many latents it has. Set data.num_nodes.")
    return FeatureGraph(int(nodes), data.edge_index, weight, dictionary, data.get("builder") or "")
