"""Propagation of a code over the feature graph: `g = ReLU(f A^T)`, with A row-normalised over each latent's neighbours.

    g_i = ReLU( sum over neighbours j of i of  w_ij / (sum of i's w) * f_j )

It is torch_geometric's `LGConv(normalize=False)` over the graph's own edges, which run from neighbour to centre, with the
weights of each centre's edges divided by their sum. (`LGConv` by default normalises symmetrically, a different map.)
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from saekit import Code, FeatureGraph, UsageError

if TYPE_CHECKING:
    from saekit import SparseAutoencoder


def normalised_weight(graph: FeatureGraph) -> Tensor:
    """The weight of each edge as a share of all edges into its centre: [E]. ValueError for a negative weight."""
    if bool((graph.weight < 0).any()):
        raise ValueError("an edge has a negative weight, so the weights are not shares of a whole.")
    totals = graph.weight.new_zeros(graph.nodes).index_add_(0, graph.edge_index[1], graph.weight)
    return graph.weight / totals[graph.edge_index[1]].clamp_min(torch.finfo(graph.weight.dtype).tiny)


def require_edges(graph: FeatureGraph) -> None:
    """UsageError if the graph has no edges: g would be zero everywhere."""
    if not graph.edge_index.shape[1]:
        raise UsageError("the feature graph has no edges, so nothing propagates. Build it with a smaller `above`.")


class Neighbourhood(NamedTuple):
    """The edges into some latents. sources: [m], the latents that they come from. centres: [c], those latents, each once.

    kept: [all edges], whether each is one of them.
    edges: [2, E], from a place in `sources` to len(sources) + a place in `centres`.
    where: [n], the place in `centres` of each latent that was asked for."""

    sources: Tensor
    centres: Tensor
    kept: Tensor
    edges: Tensor
    where: Tensor


def neighbourhood(edge_index: Tensor, latents: Tensor) -> Neighbourhood:
    """The edges of `edge_index` [2, all edges] into `latents` [n], their nodes numbered anew: sources, then centres."""
    kept = torch.isin(edge_index[1], latents)
    from_latents, to_latents = edge_index[:, kept]
    sources, edge_sources = from_latents.unique(return_inverse=True)  # [m]
    centres, where = latents.unique(return_inverse=True)  # [c]
    edges = torch.stack([edge_sources, len(sources) + torch.searchsorted(centres, to_latents)])
    return Neighbourhood(sources, centres, kept, edges, where)


class Propagation(nn.Module):
    """`g = ReLU(f A^T)` of the codes of one dictionary. It has no parameters.

    graph: the feature graph; UsageError if it has no edges.
    sae: if given, the SAE of the codes; UsageError unless the graph was built from its dictionary.
    """

    def __init__(self, graph: FeatureGraph, sae: SparseAutoencoder | None = None) -> None:
        from torch_geometric.nn import LGConv

        super().__init__()
        if sae is not None:
            graph.require(sae)
        require_edges(graph)
        self.nodes = graph.nodes
        self.conv = LGConv(normalize=False)
        self.register_buffer("edge_index", graph.edge_index)
        self.register_buffer("weight", normalised_weight(graph))

    edge_index: Tensor
    weight: Tensor

    def forward(self, f: Tensor) -> Tensor:
        """g of the dense codes f [batch, nodes], with gradients to f: [batch, nodes]."""
        weight = self.weight.to(f.dtype)
        return self._spread(f.t(), self.edge_index, weight, self.nodes).t()

    def at(self, code: Code, latents: Tensor) -> Tensor:
        """g of some latents [n] of a code, with gradients to it: [batch, n]. Only their neighbours' columns are read."""
        near = neighbourhood(self.edge_index, latents)
        f = code.columns(near.sources)  # [batch, m]
        nodes = torch.cat([f.t(), f.new_zeros(len(near.centres), len(f))])  # the centres send nothing
        g = self._spread(nodes, near.edges, self.weight[near.kept].to(f.dtype), len(nodes))
        return g[len(near.sources) + near.where].t()

    def _spread(self, x: Tensor, edges: Tensor, weight: Tensor, nodes: int) -> Tensor:
        """ReLU of the sum over incoming edges, for node features x [nodes, batch]."""
        return self.conv(x, incoming(edges, weight, nodes)).relu()


def incoming(edges: Tensor, weight: Tensor, nodes: int) -> Tensor:
    """The matrix A [nodes, nodes], sparse, with `weight` [E] of the edge j -> i at A[i, j].

    A torch_geometric layer that is given it in place of edge_index multiplies by it and makes no [E, batch] messages."""
    order = torch.argsort(edges[1], stable=True)
    offsets = torch.zeros(nodes + 1, dtype=torch.long, device=edges.device)
    torch.cumsum(torch.bincount(edges[1], minlength=nodes), 0, out=offsets[1:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(offsets, edges[0, order], weight[order], (nodes, nodes), check_invariants=False)
