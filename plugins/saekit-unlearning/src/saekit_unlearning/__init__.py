"""saekit-unlearning: removes knowledge from a model through an SAE, and measures what is left of it."""

from collections.abc import Iterator

from saekit import Component, hookimpl


@hookimpl
def saekit_losses() -> Iterator[Component]:
    yield Component(
        "feature_contrast",
        "saekit_unlearning.feature_contrast:FeatureContrast",
        "Latents of a group respond to the same inputs, those of different groups do not.",
        needs=("groups",),
    )


@hookimpl
def saekit_callbacks() -> Iterator[Component]:
    yield Component(
        "groups",
        "saekit_unlearning.groups:Groups",
        "Follows which latents rise and fall together, and groups them.",
        provides=("groups",),
    )
    yield Component(
        "importance",
        "saekit_unlearning.importance:Importance",
        "Ranks the latents by activation, gradient and what they tell of a label.",
        provides=("importance",),
    )
    yield Component(
        "prune",
        "saekit_unlearning.prune:Prune",
        "Retires the least important latents, or gives them new weights.",
        needs=("importance",),
    )
    yield Component(
        "stability",
        "saekit_unlearning.stability:Stability",
        "How much of the ranking and of the dictionary survives between checks.",
        needs=("importance",),
    )
