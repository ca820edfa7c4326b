"""The analyzer `communities`: groups of latents with more edges among them than chance gives a graph of these degrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from saekit import AgainstControls, ComponentError, FeatureGraph, OptionError, Result, RunContext
from saekit_graph.clusters import LARGEST, agglomerative, louvain, ordered

if TYPE_CHECKING:
    import networkx as nx


class Communities:
    """Louvain's communities (Blondel et al. 2008) of the feature graph, seeded, and agglomerative clusters.

    A pair's weight is the mean over both directions. Modularity (Newman and Girvan 2004) is compared with that of graphs
    of the same degrees with randomly swapped edges, since sparse graphs have communities by chance too; a note says whether
    it exceeds theirs. Agglomerative
    clusters (average linkage over 1 - weight, as many as Louvain's communities of two latents or more) are made of the
    latents with edges, if there are at most 4,096 of them.

    A latent's purity is the share of its edge weight that stays in its community.
    """

    def __init__(
        self,
        *,
        latents: Annotated[list[int], Field(description="Latents whose communities are listed.")] = [0],  # noqa: B006
        resolution: Annotated[
            float, Field(gt=0, description="Louvain's resolution: larger values give smaller communities.")
        ] = 1.0,
        rewired: Annotated[int, Field(ge=0, description="Rewired graphs for comparison.")] = 5,
        members: Annotated[int, Field(gt=0, description="The most members listed of each community.")] = 32,
    ) -> None:
        self.latents, self.resolution, self.rewired, self.members = list(latents), resolution, rewired, members

    def __call__(self, context: RunContext) -> Result:
        """scalars: communities, modularity, modularity_rewired, ... tables: communities, members, rewired."""
        graph = usable(context.graph, self.latents, context)
        G = undirected(graph)
        found = louvain(G, resolution=self.resolution, seed=context.seed)
        modularity = _modularity(G, found, self.resolution)
        controls = []
        for number in range(self.rewired):
            other = rewire(G, context.seed + number)
            controls.append(_modularity(other, louvain(other, resolution=self.resolution, seed=context.seed), self.resolution))
        clusters, note = self._agglomerative(G, sum(len(c) > 1 for c in found))
        notes = [AgainstControls.of(modularity, controls).sentence("modularity", "rewired graphs")]
        notes += [note] if note else []
        alone = [j for j in self.latents if not len(graph.neighbours(j)[0])]
        if alone:
            notes.append(
                f"Latents {alone} have no neighbours: they are in a community only through edges of other latents."
            )
        scalars: dict[str, float | int | None] = {
            "latents_with_edges": G.number_of_nodes(),
            "communities": len(found),
            "largest": len(found[0]),
            "modularity": modularity,
            "modularity_rewired": float(np.mean(controls)) if controls else None,
            "agglomerative_modularity": None if clusters is None else _modularity(G, clusters, self.resolution),
        }
        tables: dict[str, list[dict[str, Any]]] = {"communities": _sizes(G, found), "members": []}
        for latent in self.latents:
            for name, groups in (("louvain", found), ("agglomerative", clusters)):
                tables["members"] += self._members(G, groups, latent, name)
        tables["rewired"] = [{"rewired": i, "modularity": value} for i, value in enumerate(controls)]
        return Result(scalars=scalars, tables=tables, figures={"sizes": _figure(found)}, notes=notes)

    @staticmethod
    def _agglomerative(G: nx.Graph, n: int) -> tuple[list[list[int]] | None, str]:
        """Clusters of the latents with edges, or None and the reason."""
        import networkx as nx

        nodes = list(G)
        if len(nodes) > LARGEST:
            return None, f"Agglomerative clustering is left out: {len(nodes)} latents have edges, and it takes at most {LARGEST}."
        weights = nx.to_scipy_sparse_array(G, nodelist=nodes, weight="weight", dtype=np.float64)
        made = agglomerative(weights / weights.max(), clusters=n)
        return ordered([nodes[i] for i in (made == c).nonzero()[0]] for c in range(max(n, 1))), ""

    def _members(self, G: nx.Graph, groups: list[list[int]] | None, latent: int, method: str) -> list[dict[str, Any]]:
        """The members of a latent's community as rows, those with the most weight inside it first."""
        number = next((i for i, group in enumerate(groups or []) if latent in group), None)
        if groups is None or number is None:
            return []
        inside = set(groups[number])
        rows = []
        for member in inside:
            weights = [(other in inside, data["weight"]) for other, data in G[member].items()]
            total, within = sum(w for _, w in weights), sum(w for here, w in weights if here)
            rows.append(
                {
                    "of": latent,
                    "method": method,
                    "community": number,
                    "member": member,
                    "weight_inside": within,
                    "purity": within / total if total else None,
                }
            )
        rows.sort(key=lambda row: (row["member"] != latent, -float(row["weight_inside"]), row["member"]))
        return rows[: self.members]


def usable(graph: FeatureGraph | None, latents: list[int], context: RunContext) -> FeatureGraph:
    """The graph of the run's SAE. UsageError if it is stale or has no edges, and for a latent that does not exist."""
    assert graph is not None  # promised by the need `graph`
    graph.require(context.sae)
    if not graph.edge_index.shape[1]:
        raise ComponentError(
            f"the feature graph of {graph.builder or 'this SAE'} has no edges to analyse. "
            "Raise graph.tokens, lower graph.above, or use another builder."
        )
    wrong = [j for j in latents if not 0 <= j < graph.nodes]
    if wrong:
        raise OptionError("latents", f"{wrong} are not in 0 to {graph.nodes - 1}.")
    return graph.to("cpu")


def undirected(graph: FeatureGraph) -> nx.Graph:
    """The latents with edges; a pair's weight is the mean over both directions (0 for a direction without an edge)."""
    import networkx as nx

    weights: dict[tuple[int, int], float] = {}
    for (a, b), weight in zip(graph.edge_index.t().tolist(), graph.weight.tolist(), strict=True):
        if a != b:
            pair = (min(a, b), max(a, b))
            weights[pair] = weights.get(pair, 0.0) + 0.5 * weight
    G = nx.Graph()
    G.add_nodes_from(sorted({latent for pair in weights for latent in pair}))
    G.add_weighted_edges_from((a, b, weight) for (a, b), weight in sorted(weights.items()))
    return G


def rewire(G: nx.Graph, seed: int) -> nx.Graph:
    """The graph with its edges swapped at random, a few times each, so that every latent keeps its degree.

    The weights are dealt to the new edges at random. A swap that would repeat an edge or join a latent to itself is left
    out (Maslov and Sneppen 2002)."""
    import networkx as nx

    draws = np.random.default_rng(seed)
    edges = [(min(a, b), max(a, b)) for a, b in G.edges]
    present = set(edges)
    for first, second in draws.integers(len(edges), size=(5 * len(edges), 2)).tolist():
        (a, b), (c, d) = edges[first], edges[second]
        if draws.random() < 0.5:
            c, d = d, c
        new = (min(a, d), max(a, d)), (min(c, b), max(c, b))
        if len({a, b, c, d}) < 4 or new[0] in present or new[1] in present:
            continue
        present -= {edges[first], edges[second]}
        present |= set(new)
        edges[first], edges[second] = new
    weights = draws.permutation([weight for _, _, weight in G.edges(data="weight")]).tolist()
    other = nx.Graph()
    other.add_nodes_from(G)
    other.add_weighted_edges_from((a, b, weight) for (a, b), weight in zip(edges, weights, strict=True))
    return other


def _modularity(G: nx.Graph, groups: list[list[int]], resolution: float) -> float:
    import networkx as nx

    return float(nx.community.modularity(G, groups, weight="weight", resolution=resolution))


def _sizes(G: nx.Graph, groups: list[list[int]]) -> list[dict[str, Any]]:
    """A row for each community: its size and its purity."""
    rows = []
    for number, group in enumerate(groups):
        inside = set(group)
        within = sum(data["weight"] for a in group for b, data in G[a].items() if b in inside)
        total = sum(data["weight"] for a in group for data in G[a].values())
        rows.append({"community": number, "size": len(group), "purity": within / total if total else None})
    return rows


def _figure(groups: list[list[int]]) -> dict[str, Any]:
    """The sizes of the communities as a plotly figure."""
    return {
        "data": [{"type": "bar", "x": list(range(len(groups))), "y": [len(group) for group in groups]}],
        "layout": {
            "title": {"text": "Communities of the feature graph"},
            "xaxis": {"title": {"text": "community, the largest first"}},
            "yaxis": {"title": {"text": "latents"}, "type": "log"},
        },
    }
