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
    yield Component(
        "kl_unlearn",
        "saekit_unlearning.kl_unlearn:KLUnlearn",
        "With the reconstruction in place, the model forgets some texts and predicts others as before.",
        needs=("subject_model", "logits"),
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


@hookimpl
def saekit_comparisons() -> Iterator[Component]:
    yield Component(
        "unlearning_figures",
        "saekit_unlearning.variant_figures:unlearning_figures",
        "Scores, losses and thresholds of all variants, as figures for print and in the report.",
    )


@hookimpl
def saekit_recipes() -> Iterator[Component]:
    yield Component(
        "unlearning",
        "saekit_unlearning:recipes/unlearning.toml",
        "Five ways of training an SAE in order to forget, and added latents that push, on the organism, with scores and figures.",
    )


@hookimpl
def saekit_analyzers() -> Iterator[Component]:
    yield Component(
        "unlearn",
        "saekit_unlearning.unlearn:Unlearn",
        "Edits latents so that the model forgets some facts, and measures what it still knows of them and of others.",
        needs=("subject_model", "tokens", "logits"),
    )
