"""A learned alternative to `Propagation`: a graph autoencoder that reconstructs a latent's activation from its neighbours'.

One graph convolution (GCNConv, Kipf and Welling 2017, or GATConv, Velickovic et al. 2018) from neighbours to centre, then
a small readout:  g_i = rms_i * ReLU(readout(conv(f / rms)_i)).  There is one convolution and no
self-loop, since with two convolutions a latent's own activation would return to it through its neighbours; for GAT the
centre's activation is hidden from the attention. So the target is never part of the input. All latents share the weights,
so activations enter in units of each latent's RMS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from saekit import Code, FeatureGraph, Pattern, SparseCode, UsageError
from saekit_graph.propagation import neighbourhood, normalised_weight, require_edges

HIDDEN = 8  # channels of the convolution
CENTRES, ROWS = 128, 64  # latents and activations of a training step: messages of [128 * 64 * k, HIDDEN] at most


class GraphAutoencoder(nn.Module):
    """`g` of a code by a trained graph autoencoder; `train_graph_autoencoder` trains one.

    kind: "gcn" or "gat".
    rms: [nodes], each latent's root mean square, its unit; 0 for a latent that never fires, and its g is 0. UsageError
        for a graph without edges.
    """

    def __init__(self, graph: FeatureGraph, kind: Literal["gcn", "gat"], rms: Tensor) -> None:
        from torch_geometric.nn import GATConv, GCNConv

        super().__init__()
        require_edges(graph)
        self.kind, self.nodes = kind, graph.nodes
        self.conv: nn.Module
        if kind == "gcn":  # the shares are the normalisation, as in `Propagation`
            self.conv = GCNConv(1, HIDDEN, add_self_loops=False, normalize=False)
        else:
            self.conv = GATConv((1, 1), HIDDEN, add_self_loops=False, edge_dim=1)
        self.readout = nn.Sequential(nn.ReLU(), nn.Linear(HIDDEN, 1))
        self.register_buffer("edge_index", graph.edge_index)
        self.register_buffer("weight", normalised_weight(graph))
        self.register_buffer("rms", rms.float())

    edge_index: Tensor
    weight: Tensor
    rms: Tensor

    def at(self, code: Code, latents: Tensor) -> Tensor:
        """g of some latents [n] of a code: [batch, n]. Only their neighbours' columns are read."""
        near = neighbourhood(self.edge_index, latents)
        f = code.columns(near.sources) / self.rms[near.sources].clamp_min(1e-12)  # [batch, m]
        g = self.spread(f, near.edges, self.weight[near.kept], len(near.centres))
        return (g * self.rms[near.centres])[:, near.where]

    def spread(self, f: Tensor, edges: Tensor, weight: Tensor, centres: int) -> Tensor:
        """g, in units of RMS, of `centres` latents from f [batch, m] of their neighbours, in the same units: [batch, centres].

        edges: [2, E] from a neighbour, 0 to m - 1, to a centre, m to m + centres - 1."""
        batch, m = f.shape
        nodes = m + centres
        # One graph for each activation, side by side. The centres' own activations are set to 0.
        x = torch.cat([f, f.new_zeros(batch, centres)], 1).reshape(-1, 1)
        shift = nodes * torch.arange(batch, device=f.device)
        many = (edges[:, None, :] + shift[None, :, None]).reshape(2, -1)
        weights = weight.to(f.dtype).repeat(batch)
        if self.kind == "gcn":
            h = self.conv(x, many, weights)
        else:
            h = self.conv((x, torch.zeros_like(x)), many, weights.unsqueeze(1))
        return self.readout(h).view(batch, nodes)[:, m:].relu()


def train_graph_autoencoder(
    graph: FeatureGraph,
    codes: Sequence[Code],
    *,
    kind: Literal["gcn", "gat"],
    steps: int = 300,
    lr: float = 1e-2,
    seed: int = 0,
) -> GraphAutoencoder:
    """Train one to reconstruct the activations of random latents with neighbours, on random rows of `codes`.

    The loss is the squared error in units of each latent's RMS. Every draw is from `seed`."""
    square = sum((_square_sums(code) for code in codes), start=torch.zeros(graph.nodes))
    rms = (square / max(1, sum(map(len, codes)))).sqrt()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the initial weights of torch_geometric's layers
        model = GraphAutoencoder(graph, kind, rms)
    able = torch.zeros(graph.nodes, dtype=torch.bool)
    able[graph.edge_index[1]] = True
    pool = (able & (rms > 0)).nonzero().squeeze(1)  # latents that fire and have neighbours
    if not len(pool):
        raise UsageError("no latent that fires has a neighbour in the feature graph, so there is nothing to learn.")
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            code = codes[int(torch.randint(len(codes), (1,), generator=draws))]
            latents = pool[torch.randperm(len(pool), generator=draws)[:CENTRES]]
            some = _rows(code, torch.randint(len(code), (ROWS,), generator=draws))
            error = (model.at(some, latents) - some.columns(latents)) / rms[latents]
            optimizer.zero_grad()
            error.square().mean().backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def explained(g: Tensor, f: Tensor) -> float:
    """The share of the variance of f [rows, n] that g [rows, n] explains, each latent in units of its own variance."""
    spread = (f - f.mean(0)).square().mean(0)
    kept = spread > 0
    return float(1 - ((g - f).square().mean(0)[kept] / spread[kept]).mean())


def _square_sums(code: Code) -> Tensor:
    _, latents, values = code.nonzero()
    return torch.zeros(code.d_sae).index_add_(0, latents.cpu(), values.detach().float().cpu().square())


def _rows(code: Code, chosen: Tensor) -> Code:
    """The rows `chosen` of a code, repeated as they are there, without gradient."""
    rows, latents, values = (t.detach().cpu() for t in code.nonzero())
    offsets = torch.zeros(len(code) + 1, dtype=torch.long)
    torch.cumsum(torch.bincount(rows, minlength=len(code)), 0, out=offsets[1:])
    lengths = offsets.diff()[chosen]
    new = torch.repeat_interleave(torch.arange(len(chosen)), lengths)
    starts = torch.cumsum(lengths, 0) - lengths
    entries = torch.arange(len(new)) - starts[new] + offsets[chosen][new]
    return SparseCode(Pattern.of_rows(new, latents[entries], len(chosen), code.d_sae), values[entries])
