"""Which latents belong together: pairs that fire together with their correlations, and clusters of them. Memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from saekit import Code
from saekit_graph.activation_graphs import Firings

if TYPE_CHECKING:
    import networkx as nx

LARGEST = 4096  # the most latents clustered at once: the matrix of their distances takes 128 MB
VISITS = 1 << 24  # pairs of firings looked at: each pair of latents is at least one, so all of them take 200 MB


@dataclass(frozen=True)
class Pairs:
    """Pairs of latents that fire together, each once, with a weight.

    first, second: [n] int32, first < second. weight: [n] float32. latents: how many latents there are, paired or not.
    tokens: of how many activations.
    """

    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray
    latents: int
    tokens: int

    def __len__(self) -> int:
        return len(self.weight)

    def percentile(self, percent: float) -> float:
        """The weight that `percent` of the pairs do not exceed. ValueError if there is no pair."""
        if not len(self):
            raise ValueError("no two latents fire together, so there is no percentile of their weights.")
        return float(np.percentile(self.weight, percent))

    def above(self, threshold: float) -> Pairs:
        """The pairs whose weight exceeds `threshold`."""
        kept = self.weight > threshold
        return Pairs(self.first[kept], self.second[kept], self.weight[kept], self.latents, self.tokens)

    def matrix(self) -> Any:
        """The weights as a symmetric scipy CSR matrix [latents, latents]."""
        from scipy.sparse import coo_matrix

        ends = np.concatenate([self.first, self.second]), np.concatenate([self.second, self.first])
        shape = (self.latents, self.latents)
        return coo_matrix((np.concatenate([self.weight, self.weight]), ends), shape=shape).tocsr()

    def spanning_forest(self) -> Pairs:
        """The pairs that connect as much as all of them do, above every threshold: a maximum spanning forest."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import minimum_spanning_tree

        lengths = 2.0 - self.weight.astype(np.float64)  # an entry of 0 would be no edge
        shape = (self.latents, self.latents)
        tree = minimum_spanning_tree(coo_matrix((lengths, (self.first, self.second)), shape=shape)).tocoo()
        ends = np.sort(np.stack([tree.row, tree.col]), axis=0)
        return Pairs(ends[0], ends[1], (2.0 - tree.data).astype(np.float32), self.latents, self.tokens)

    def components(self) -> list[np.ndarray]:
        """The connected components of two latents or more, the largest first."""
        from scipy.sparse.csgraph import connected_components

        _, of = connected_components(self.matrix(), directed=False)
        order = np.argsort(of, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(of[order])) + 1)
        return sorted((part for part in parts if len(part) > 1), key=lambda part: (-len(part), part[0]))


def correlated_pairs(codes: Iterator[Code], d_sae: int, *, least: int = 10, visits: int = VISITS) -> Pairs:
    """The Pearson correlation, zeros included, of every two latents that fire together at least once.

    least: how often a latent must fire, since two that fire once, together, correlate perfectly.
    visits: the most pairs of firings in one activation, summed over activations; the last activations within it are taken.
        Time and memory grow with it, and not with d_sae.
    """
    firings = Firings.of(codes, d_sae, np.float64)
    active = np.diff(firings.by_token.indptr).astype(np.int64)
    within = np.cumsum((active * (active - 1) // 2)[::-1])[::-1] <= visits
    firings = Firings(firings.by_token[within])
    often = np.flatnonzero(firings.counts() >= least)
    firings = Firings(firings.by_token[:, often])
    pearson, parts = firings.pearson(), []
    for start, joint in firings.joint() if len(often) else ():
        ours = start + np.repeat(np.arange(joint.shape[0]), np.diff(joint.indptr))
        theirs, once = joint.indices, joint.indices > ours
        ours, theirs = ours[once], theirs[once]
        weight = pearson(joint.data[once], ours, theirs).astype(np.float32)
        parts.append((often[ours].astype(np.int32), often[theirs].astype(np.int32), weight))
    none = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32)
    first, second, weight = (np.concatenate([none[i], *(part[i] for part in parts)]) for i in range(3))
    return Pairs(first, second, weight, d_sae, firings.tokens)


def agglomerative(similarity: Any, *, clusters: int | None = None, above: float | None = None) -> np.ndarray:
    """Average linkage over 1 - similarity: the number of each node's cluster, [n].

    similarity: [n, n], at most 1, dense or sparse; 0 where there is none.
    clusters: how many to make; or above: two clusters are joined if the mean similarity of their members exceeds it. With
        `above` of 0 or more only clusters with a similarity between them are joined: the graph constrains the clusters.
    ValueError for more than 4,096 nodes, whose distances would not fit.
    """
    from sklearn.cluster import AgglomerativeClustering

    n = similarity.shape[0]
    if n > LARGEST:
        raise ValueError(f"{n} nodes are too many: average linkage holds all distances, and takes at most {LARGEST}.")
    if n < 2:
        return np.zeros(n, dtype=np.int64)
    distance = 1.0 - np.asarray(similarity.todense() if hasattr(similarity, "todense") else similarity, dtype=np.float64)
    np.fill_diagonal(distance, 0.0)
    cut = None if above is None else 1.0 - above
    many = None if clusters is None else max(min(clusters, n), 1)
    return AgglomerativeClustering(many, metric="precomputed", linkage="average", distance_threshold=cut).fit_predict(distance)


def louvain(G: nx.Graph, *, resolution: float = 1.0, seed: int = 0) -> list[list[Any]]:
    """Louvain's communities (Blondel et al. 2008) by the edges' weights, the largest first, each sorted."""
    import networkx as nx

    return ordered(nx.community.louvain_communities(G, weight="weight", resolution=resolution, seed=seed % 2**32))


def ordered(groups: Any) -> list[list[Any]]:
    """Groups without the empty ones, the largest first, each sorted."""
    return sorted((sorted(group) for group in groups if group), key=lambda group: (-len(group), group[0]))
