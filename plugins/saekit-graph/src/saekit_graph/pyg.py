"""`FeatureGraph` to and from torch_geometric's `Data`; the digest of its dictionary is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from saekit import FeatureGraph, UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch_geometric.data import Data


def to_pyg(graph: FeatureGraph, x: Tensor | None = None) -> Data:
    """The graph as torch_geometric's `Data`: `edge_index` [2, E] from neighbour to centre, `edge_weight` [E], `num_nodes`.

    x: [nodes, n], features of the latents, if any. `dictionary` and `builder` are kept, so that the graph from
        `from_pyg` still knows its SAE.
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
    """The graph of `Data` made by `to_pyg`, also after transforms of torch_geometric.

    Edges without weights get weight 1. UsageError if `data` has no edge_index or does not name its dictionary;
    ValueError if the shapes do not fit."""
    if data.edge_index is None:
        raise UsageError("this Data has no edge_index, so it is not a graph. Set data.edge_index, [2, E].")
    dictionary = data.get("dictionary")
    if not isinstance(dictionary, str):
        raise UsageError(
            "this Data does not name the dictionary that it was built from, so a stale graph could not be detected. Set "
            "data.dictionary = graph.dictionary of the original graph, or make it with FeatureGraph.of(sae, ...)."
        )
    weight = data.get("edge_weight")
    if weight is None:
        weight = torch.ones(data.edge_index.shape[1], device=data.edge_index.device)
    nodes = data.num_nodes
    if nodes is None:
        raise UsageError("this Data does not give the number of latents. Set data.num_nodes.")
    return FeatureGraph(int(nodes), data.edge_index, weight, dictionary, data.get("builder") or "")
