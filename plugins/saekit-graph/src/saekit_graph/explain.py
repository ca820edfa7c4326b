"""The analyzer `explain_neighbours`: which neighbours drive a latent's propagated activation g."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from saekit import AgainstControls, Result, RunContext
from saekit_graph.communities import usable
from saekit_graph.propagation import normalised_weight

if TYPE_CHECKING:
    from torch_geometric.nn import MessagePassing

ROWS = 2048  # held-out activations, evenly spread, that GNNExplainer is given


class ExplainNeighbours:
    """What each neighbour of a latent k adds to `g_k = ReLU(sum_j A_kj f_j)` on held-out activations.

    For this propagation the answer is known: where g_k > 0 it is a sum, and neighbour j's share of it is
    A_kj mean(f_j) / mean(g_k). It is compared with the mask of GNNExplainer (Ying et al. 2019), which needs no formula and so
    works for learned propagations too: their rank correlation says how far the mask can be trusted here. The control is
    the order by edge weight alone, which ignores activations.
    """

    def __init__(
        self,
        *,
        latents: Annotated[list[int], Field(description="The latents to explain.")] = [0],  # noqa: B006
        epochs: Annotated[int, Field(gt=0, description="Steps of GNNExplainer's optimisation.")] = 200,
        tokens: Annotated[
            int | None, Field(gt=0, description="Held-out activations; evaluation.tokens by default.")
        ] = None,
    ) -> None:
        self.latents, self.epochs, self.tokens = list(latents), epochs, tokens

    def __call__(self, context: RunContext) -> Result:
        """scalars: explained, rank_agreement, rank_agreement_of_weights. tables: neighbours."""
        graph = usable(context.graph, self.latents, context)
        shares = normalised_weight(graph)
        of = {k: (graph.edge_index[1] == k).nonzero().squeeze(1) for k in self.latents}  # edges into each
        codes = self._codes(context, {k: graph.edge_index[0, edges] for k, edges in of.items()})
        rows: list[dict[str, Any]] = []
        notes, agreements, controls = [], [], []
        for k, edges in of.items():
            A, f = shares[edges], codes[k]  # [n], [rows, n]
            if not len(edges) or not bool(f.any()):
                silent = f"has {len(edges)} neighbours, none of which fires on held-out data"
                what = silent if len(edges) else "has no neighbours"
                notes.append(f"Latent {k} {what}: its g is 0 everywhere, so there is nothing to explain.")
                continue
            exact = exact_shares(f, A)
            mask = gnn_explainer_mask(f, A, epochs=self.epochs, seed=context.seed)
            agreements.append(rank_agreement(mask, exact))
            controls.append(rank_agreement(A, exact))
            rows += [
                {
                    "latent": k,
                    "neighbour": int(graph.edge_index[0, edges[i]]),
                    "weight": float(graph.weight[edges[i]]),
                    "fires": float((f[:, i] != 0).float().mean()),
                    "share": float(exact[i]),
                    "gnn_explainer": float(mask[i]),
                }
                for i in exact.argsort(descending=True, stable=True).tolist()
            ]
        if agreements:
            beside = AgainstControls(_mean(agreements), (_mean(controls),))
            notes.insert(0, beside.sentence("rank agreement of GNNExplainer", "the order by edge weight alone"))
        scalars: dict[str, float | int | None] = {
            "explained": len(agreements),
            "rank_agreement": _mean(agreements),
            "rank_agreement_of_weights": _mean(controls),
        }
        return Result(scalars=scalars, tables={"neighbours": rows}, notes=notes)

    def _codes(self, context: RunContext, neighbours: dict[int, Tensor]) -> dict[int, Tensor]:
        """The activations of each latent's neighbours on held-out data: [rows, n] each, on the CPU."""
        kept: dict[int, list[Tensor]] = {k: [] for k in neighbours}
        for step in context.held_out(self.tokens):
            for k, latents in neighbours.items():
                kept[k].append(step.code.columns(latents.to(step.x.device)).float().cpu())
        return {k: torch.cat(parts) for k, parts in kept.items()}


def exact_shares(f: Tensor, A: Tensor) -> Tensor:
    """Each neighbour's share of g over all rows where g > 0: [n], for f [rows, n] and A [n]."""
    parts = f * A  # [rows, n]
    parts = parts[parts.sum(1) > 0].double().sum(0)
    return parts / parts.sum().clamp_min(1e-300)


def gnn_explainer_mask(f: Tensor, A: Tensor, *, epochs: int = 200, seed: int = 0) -> Tensor:
    """GNNExplainer's mask [n], 0 to 1, of the edges with shares A [n] into one latent, for the codes f [rows, n].

    The graph is the star of the latent and its neighbours, activations are the node features, and the masked graph has to
    preserve g on all rows. g is scaled to unit RMS, so that the mask does not depend on the code's units."""
    from torch_geometric.explain import Explainer, GNNExplainer, ModelConfig

    live = (f * A).sum(1) > 0
    f = f[live]
    f = f[torch.linspace(0, len(f) - 1, min(ROWS, len(f))).round().long()]
    f = f / (f * A).sum(1).square().mean().sqrt().clamp_min(1e-30)
    n = len(A)
    x = torch.cat([f.t(), f.new_zeros(1, len(f))])  # [n + 1, rows]; the latent itself comes last and sends nothing
    edges = torch.stack([torch.arange(n), torch.full((n,), n)])
    config = ModelConfig(mode="regression", task_level="node", return_type="raw")
    algorithm = GNNExplainer(epochs=epochs, lr=0.05, edge_size=0.02, edge_ent=0.0)
    explainer = Explainer(_Star(), algorithm, explanation_type="model", edge_mask_type="object", model_config=config)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        found = explainer(x, edges, index=torch.tensor([n]), edge_weight=A)
    return found.edge_mask.detach()


class _Star(nn.Module):
    """`Propagation` message by message, so that GNNExplainer can mask each of them."""

    def __init__(self) -> None:
        from torch_geometric.nn import LGConv

        super().__init__()
        self.conv: MessagePassing = LGConv(normalize=False)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        return self.conv(x, edge_index, edge_weight).relu()


def rank_agreement(first: Tensor, second: Tensor) -> float | None:
    """Spearman's rank correlation of two measures [n] of the same edges; None if one of them is constant."""
    from scipy.stats import spearmanr

    if len(first) < 2 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return None
    return float(spearmanr(first.numpy(), second.numpy()).statistic)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
