"""The analyzer `propagation`: how well a latent's neighbours in the feature graph predict it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from saekit import AgainstControls, Code, FeatureGraph, Result, RunContext
from saekit_graph.communities import usable
from saekit_graph.graph_autoencoder import GraphAutoencoder, train_graph_autoencoder
from saekit_graph.propagation import Propagation


class NeighbourPrediction:
    """The squared Pearson correlation, on held-out data, of g (from a latent's neighbours) with the latent's own f.

    mean: `g = ReLU(f A^T)`, without training. gcn, gat: a graph autoencoder over the feature graph, trained on training data
    to reconstruct each latent from its neighbours, see `saekit_graph.graph_autoencoder`. The controls are the same with random
    neighbours: the graph with the sources of its edges permuted, trained again. A note says whether the mean exceeds theirs.
    """

    def __init__(
        self,
        *,
        propagation: Annotated[
            Literal["mean", "gcn", "gat"], Field(description="mean: weighted by the edges; gcn and gat: learned.")
        ] = "mean",
        latents: Annotated[list[int], Field(description="Latents that are always listed.")] = [0],  # noqa: B006
        sample: Annotated[
            int, Field(gt=0, description="Other latents with neighbours, drawn at random, to average over.")
        ] = 256,
        controls: Annotated[int, Field(gt=0, description="Graphs with random neighbours for comparison.")] = 5,
        steps: Annotated[int, Field(gt=0, description="Steps of training, for gcn and gat.")] = 300,
        tokens: Annotated[
            int | None, Field(gt=0, description="Activations, held-out and to train on; evaluation.tokens by default.")
        ] = None,
    ) -> None:
        self.propagation, self.latents, self.sample = propagation, list(latents), sample
        self.controls, self.steps, self.tokens = controls, steps, tokens

    def __call__(self, context: RunContext) -> Result:
        """scalars: latents, r2, r2_control (the mean over the controls). tables: latents."""
        graph = usable(context.graph, self.latents, context)
        draws = torch.Generator().manual_seed(context.seed)
        drawn = graph.edge_index[1].unique()
        drawn = drawn[torch.randperm(len(drawn), generator=draws)[: self.sample]]
        chosen = torch.cat([torch.tensor(self.latents, dtype=torch.long), drawn]).unique()
        others = [_with_random_neighbours(graph, draws) for _ in range(self.controls)]
        codes = [] if self.propagation == "mean" else list(self._training_codes(context))
        found = self._r2(context, self._model(graph, codes, context.seed), chosen)
        each = torch.stack([self._r2(context, self._model(other, codes, context.seed), chosen) for other in others])
        control = each.mean(0)
        known = ~found.isnan() & ~control.isnan()
        rows: list[dict[str, Any]] = [
            {"latent": latent, "r2": _plain(found[place]), "r2_control": _plain(control[place])}
            for latent in self.latents
            for place in (chosen == latent).nonzero()[0].tolist()
        ]
        if known.any():
            beside = AgainstControls.of(float(found[known].mean()), each[:, known].mean(1).tolist())
            notes = [beside.sentence("mean r2", "graphs with random neighbours")]
        else:
            notes = ["None of these latents both fires on held-out data and has neighbours."]
        scalars: dict[str, float | int | None] = {
            "latents": int(known.sum()),
            "r2": _plain(found[known].mean()),
            "r2_control": _plain(control[known].mean()),
        }
        return Result(scalars=scalars, tables={"latents": rows}, notes=notes)

    def _model(self, graph: FeatureGraph, codes: list[Code], seed: int) -> Propagation | GraphAutoencoder:
        if self.propagation == "mean":
            return Propagation(graph)
        return train_graph_autoencoder(graph, codes, kind=self.propagation, steps=self.steps, seed=seed)

    def _training_codes(self, context: RunContext) -> Iterator[Code]:
        for batch in context.training_activations(self.tokens or context.config.evaluation.tokens):
            with torch.no_grad():
                yield context.step(batch).code

    @torch.no_grad()
    def _r2(self, context: RunContext, model: Propagation | GraphAutoencoder, latents: Tensor) -> Tensor:
        """[n] float64; NaN for a latent that never fires, 0 if its g is constant."""
        model = model.to(context.device)
        n, sums = 0, torch.zeros(5, len(latents), dtype=torch.float64)
        for step in context.held_out(self.tokens):
            at = latents.to(step.x.device)
            g, f = (t.double().cpu() for t in (model.at(step.code, at), step.code.columns(at)))
            sums += torch.stack([g.sum(0), f.sum(0), (g * g).sum(0), (f * f).sum(0), (g * f).sum(0)])
            n += len(g)
        g, f, gg, ff, gf = sums / max(n, 1)
        spread_g, spread_f = gg - g * g, ff - f * f
        r2 = (gf - g * f).square() / (spread_g * spread_f).clamp_min(1e-300)
        r2 = torch.where(spread_g > 1e-12 * gg, r2, 0.0)
        return torch.where(spread_f > 1e-12 * ff, r2, torch.nan)


def _with_random_neighbours(graph: FeatureGraph, draws: torch.Generator) -> FeatureGraph:
    """The graph with the sources of its edges permuted."""
    order = torch.randperm(graph.nodes, generator=draws)
    edges = torch.stack([order[graph.edge_index[0]], graph.edge_index[1]])
    edges[0, edges[0] == edges[1]] = order[0]  # a latent is not its own neighbour
    return FeatureGraph(graph.nodes, edges, graph.weight, graph.dictionary)


def _plain(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)
