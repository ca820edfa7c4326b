"""saekit-steering: steers a model along a latent and compares the effect with random directions of the same norm."""

from collections.abc import Iterator

from saekit import Component, hookimpl


@hookimpl
def saekit_analyzers() -> Iterator[Component]:
    yield Component(
        "steer",
        "saekit_steering.steer:Steer",
        "Adds a latent's decoder row at several strengths, and compares the effect with random directions.",
        needs=("subject_model", "tokens", "sequences"),
    )
