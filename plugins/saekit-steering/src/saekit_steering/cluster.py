"""The steered latent and its graph neighbours: their propagated activation g, and their activity in each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saekit import Code, FeatureGraph, RunContext, SequenceBatch, SparseAutoencoder, own_numerics
from saekit_steering.typical_tokens import of_class


class Cluster:
    """A latent with its neighbours in the feature graph; the latent alone if there is no graph.

    latents: the steered one, then at most `neighbours` others by edge weight.
    graph: None if there is none.
    """

    def __init__(self, context: RunContext, latent: int, neighbours: int) -> None:
        self.graph: FeatureGraph | None = context.graph
        self.latents = [latent]
        if self.graph is not None:
            self.graph.require(context.sae)
            others, weights = self.graph.neighbours(latent)
            order = weights.abs().argsort(descending=True, stable=True)
            self.latents += [j for j in others[order].tolist() if j != latent][:neighbours]
            self._needed, self._edges = _edges(self.graph, self.latents)

    def read(self, code: Code) -> tuple[Tensor, Tensor | None]:
        """f and g of the cluster's latents, [batch, m] each; g is None without a graph.

        g = ReLU(f A^T), where row i of A holds the edges of latent i divided by the sum of their absolute weights. A
        latent without neighbours has g = 0."""
        place = code.sum().device
        f = code.columns(torch.tensor(self.latents, device=place)).float()
        if self.graph is None:
            return f, None
        return f, (code.columns(self._needed.to(place)).float() @ self._edges.to(place).t()).relu()


def _edges(graph: FeatureGraph, latents: list[int]) -> tuple[Tensor, Tensor]:
    """The neighbours of all `latents`, [u], and the row-normalised weights, [m, u]."""
    pairs = [graph.neighbours(latent) for latent in latents]
    needed = torch.cat([others for others, _ in pairs]).unique()
    edges = torch.zeros(len(latents), len(needed), device=needed.device)
    for row, (others, weights) in enumerate(pairs):
        total = weights.abs().sum()
        if total > 0:
            edges[row].index_add_(0, torch.searchsorted(needed, others), weights / total)
    return needed, edges


@dataclass(frozen=True)
class Classes:
    """Mean and standard deviation of each latent's f and g over the positions of held-out sequences without and with the
    concept, [2, m] each (g: None without a graph). positions: the number in each class."""

    f_mean: Tensor
    f_std: Tensor
    g_mean: Tensor | None
    g_std: Tensor | None
    positions: list[int]


class ClassMoments:
    """Sums for `Classes`, batch by batch. column: of the labels. scale: the factor from activations to the SAE's input."""

    def __init__(self, sae: SparseAutoencoder, cluster: Cluster, column: int, scale: float) -> None:
        self.sae, self.cluster, self.column, self.scale = sae, cluster, column, scale
        self._sums = torch.zeros(2, 2, 2, len(cluster.latents), dtype=torch.float64)  # class, f or g, moment
        self._positions = [0, 0]

    @torch.no_grad()
    def add(self, batch: SequenceBatch) -> None:
        """Add every position of a batch's labelled sequences."""
        for label in (0, 1):
            x = batch.x[of_class(batch, self.column, label)] * self.scale  # [p, d]
            with own_numerics(self.sae, x.device):
                f, g = self.cluster.read(self.sae.encode(x.to(self.sae.W_dec.dtype)))
            for which, values in enumerate((f, g)):
                if values is not None:
                    self._sums[label, which] += torch.stack([values.sum(0), values.square().sum(0)]).double().cpu()
            self._positions[label] += len(x)

    def found(self) -> Classes:
        """Means and standard deviations; both classes must have been seen."""
        moments = self._sums / torch.tensor(self._positions, dtype=torch.float64)[:, None, None, None]
        mean = moments[:, :, 0]  # [class, f or g, m]
        std = (moments[:, :, 1] - mean.square()).clamp_min(0).sqrt()
        with_g = self.cluster.graph is not None
        return Classes(
            f_mean=mean[:, 0],
            f_std=std[:, 0],
            g_mean=mean[:, 1] if with_g else None,
            g_std=std[:, 1] if with_g else None,
            positions=self._positions,
        )


def class_table(cluster: Cluster, found: Classes) -> list[dict[str, Any]]:
    """A row for each latent: mean and standard deviation of f and g by class."""
    rows = []
    for at, latent in enumerate(cluster.latents):
        row: dict[str, Any] = {"latent": latent}
        for name, mean, std in (("f", found.f_mean, found.f_std), ("g", found.g_mean, found.g_std)):
            if mean is not None and std is not None:
                for label, word in ((1, "with"), (0, "without")):
                    row[f"{name}_mean_{word}"] = float(mean[label, at])
                    row[f"{name}_std_{word}"] = float(std[label, at])
        rows.append(row)
    return rows


def sign_agreement(change: Tensor, expected: Tensor, forward: bool) -> float:
    """The share of latents with a non-zero change [m] whose sign is that of `expected` [m], the mean with the concept minus
    the mean without; the opposite sign if steering is not `forward` but away from the concept."""
    wanted = expected.sign() if forward else -expected.sign()
    return float(((change.sign() == wanted) & (change != 0)).double().mean())
