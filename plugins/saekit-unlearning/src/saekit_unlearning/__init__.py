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
