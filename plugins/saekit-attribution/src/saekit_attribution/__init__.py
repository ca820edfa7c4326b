"""saekit-attribution: which latents cause an answer, by attribution patching, integrated gradients and exact ablation."""

from collections.abc import Iterator

from saekit import Component, hookimpl


@hookimpl
def saekit_analyzers() -> Iterator[Component]:
    yield Component(
        "atp",
        "saekit_attribution.atp.analyzer:AttributionPatching",
        "Which latents cause flagged answers, by estimate and by exact effect.",
        needs=("subject_model", "tokens"),
    )
    yield Component(
        "ablate",
        "saekit_attribution.ablate.analyzer:Ablate",
        "Ablates the latents that cause flagged answers, asks again, and measures the behaviour.",
        needs=("subject_model", "tokens"),
    )


@hookimpl
def saekit_recipes() -> Iterator[Component]:
    yield Component(
        "sycophancy",
        "saekit_attribution:recipes/sycophancy.toml",
        "Which latents make the model organism sycophantic, and how it answers without them, in ten minutes.",
    )
