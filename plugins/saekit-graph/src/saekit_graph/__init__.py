"""saekit-graph: graphs over the latents of a sparse autoencoder, and propagation along them, with torch_geometric."""

from collections.abc import Iterator

from saekit import Component, hookimpl


@hookimpl
def saekit_graph_builders() -> Iterator[Component]:
    yield Component("cosine", "saekit_graph.cosine:Cosine", "Latents whose decoder rows point the same way.")
    yield Component(
        "correlation", "saekit_graph.activation_graphs:Correlation", "Latents whose activations rise and fall together."
    )
    yield Component(
        "coactivation",
        "saekit_graph.activation_graphs:Coactivation",
        "Latents that fire on the same activations (Jaccard).",
    )
    yield Component(
        "pmi", "saekit_graph.activation_graphs:PMI", "Latents that fire together more often than by chance."
    )


@hookimpl
def saekit_losses() -> Iterator[Component]:
    yield Component(
        "cluster",
        "saekit_graph.cluster:Cluster",
        "Aligns a latent and its neighbours in the feature graph with a labelled concept.",
        needs=("sequences", "graph"),
    )


@hookimpl
def saekit_callbacks() -> Iterator[Component]:
    yield Component(
        "refresh_graph",
        "saekit_graph.refresh:RefreshGraph",
        "Rebuilds the feature graph every few steps of training.",
        provides=("graph",),
    )


@hookimpl
def saekit_analyzers() -> Iterator[Component]:
    yield Component(
        "communities",
        "saekit_graph.communities:Communities",
        "Communities of the feature graph, compared with those of rewired graphs.",
        needs=("graph",),
    )
    yield Component(
        "explain_neighbours",
        "saekit_graph.explain:ExplainNeighbours",
        "Which neighbours drive a latent's propagated activation g: exact shares and GNNExplainer.",
        needs=("graph",),
    )
    yield Component(
        "propagation",
        "saekit_graph.neighbour_prediction:NeighbourPrediction",
        "How well a latent's neighbours predict it, by mean or learned (GCN, GAT) propagation, compared with random neighbours.",
        needs=("graph",),
    )
