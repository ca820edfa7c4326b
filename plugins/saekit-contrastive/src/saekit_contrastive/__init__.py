"""saekit-contrastive: gives latents a meaning during training, by fixed concept vectors and contrastive losses."""

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
        "The loss `concept` on the labelled rows of the batch itself.",
        needs=("labels",),
    )
    yield Component(
        "infonce",
        "saekit_contrastive.infonce:InfoNCE",
        "Sequences of one kind get similar pooled codes, sequences of different kinds do not.",
        needs=("sequences",),
    )
    yield Component(
        "infonce_cluster",
        "saekit_contrastive.infonce:InfoNCECluster",
        "The loss `infonce`, in which chosen latents and their neighbours in the feature graph weigh more.",
        needs=("sequences", "graph"),
    )
    yield Component(
        "leakage",
        "saekit_contrastive.leakage:Leakage",
        "Penalises other latents that also predict the concepts.",
        needs=("sequences",),
    )


@hookimpl
def saekit_metrics() -> Iterator[Component]:
    yield Component(
        "concept_auroc",
        "saekit_contrastive.concept_auroc:ConceptAUROC",
        "How well latents predict their concepts on held-out sequences, compared with probes and other latents.",
        needs=("sequences",),
    )


@hookimpl
def saekit_analyzers() -> Iterator[Component]:
    yield Component(
        "concept_recovery",
        "saekit_contrastive.concept_recovery:ConceptRecovery",
        "Whether one latent stands for each concept, beside neurons, an untrained SAE, shuffled labels and a probe.",
        needs=("labels",),
    )


@hookimpl
def saekit_recipes() -> Iterator[Component]:
    yield Component(
        "concept",
        "saekit_contrastive:recipes/concept.toml",
        "Makes latent 0 mean Python code on the model organism, and compares seven ways, in ten minutes.",
    )
