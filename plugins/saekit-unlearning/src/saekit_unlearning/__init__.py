"""saekit-unlearning: removes knowledge from a model through an SAE, and measures what is left of it."""

from collections.abc import Iterator

from saekit import Component, hookimpl


@hookimpl
def saekit_analyzers() -> Iterator[Component]:
    yield Component(
        "unlearn",
        "saekit_unlearning.unlearn:Unlearn",
        "Edits latents so that the model forgets some facts, and measures what it still knows of them and of others.",
        needs=("subject_model", "tokens", "logits"),
    )
