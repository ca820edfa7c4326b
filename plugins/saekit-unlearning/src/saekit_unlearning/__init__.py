"""saekit-unlearning: removes knowledge from a model through an SAE, and measures what is left of it."""

from collections.abc import Iterator

from saekit import Component, hookimpl


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
        "Five ways of training an SAE in order to forget, on the model organism, with their scores and figures.",
    )
