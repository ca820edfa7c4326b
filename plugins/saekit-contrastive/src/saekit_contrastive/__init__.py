"""saekit-contrastive: gives a latent a meaning while an SAE trains: fixed concept vectors, contrastive losses, measures."""

from collections.abc import Iterator

from saekit import Component, hookimpl


@hookimpl
def saekit_architectures() -> Iterator[Component]:
    yield Component(
        "hsae", "saekit_contrastive.hsae:HSAE", "Any architecture, with decoder rows fixed to concept vectors."
    )


@hookimpl
def saekit_losses() -> Iterator[Component]:
    yield Component(
        "concept",
        "saekit_contrastive.concept:Concept",
        "Chosen latents fire where their concepts are in labelled sequences, and nowhere else.",
        needs=("sequences",),
    )
    yield Component(
        "concept_rows",
        "saekit_contrastive.concept:ConceptRows",
        "The same on the labelled rows of the batch, where every row has a label.",
        needs=("labels",),
    )
    yield Component(
        "infonce",
        "saekit_contrastive.infonce:InfoNCE",
        "Sequences of one kind have pooled codes that are alike, those of other kinds have not.",
        needs=("sequences",),
    )
    yield Component(
        "infonce_cluster",
        "saekit_contrastive.infonce:InfoNCECluster",
        "The same, where chosen latents and their neighbours in the feature graph weigh more.",
        needs=("sequences", "graph"),
    )
    yield Component(
        "leakage",
        "saekit_contrastive.leakage:Leakage",
        "Penalises other latents whose activations tell the concepts too.",
        needs=("sequences",),
    )


@hookimpl
def saekit_metrics() -> Iterator[Component]:
    yield Component(
        "concept_auroc",
        "saekit_contrastive.concept_auroc:ConceptAUROC",
        "How well latents tell their concepts on held-out sequences, beside probes and other latents.",
        needs=("sequences",),
    )


@hookimpl
def saekit_recipes() -> Iterator[Component]:
    yield Component(
        "concept",
        "saekit_contrastive:recipes/concept.toml",
        "Makes latent 0 mean Python code on the model organism, and compares seven ways to try, in ten minutes.",
    )
