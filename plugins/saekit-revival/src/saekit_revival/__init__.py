"""saekit-revival: revives dead latents, and says whether they stay alive."""

from collections.abc import Iterator

from saekit import Component, hookimpl


@hookimpl
def saekit_losses() -> Iterator[Component]:
    yield Component("usage_kl", "saekit_revival.usage_kl:UsageKL", "Latents should fire at a target rate.")
    yield Component("ghost", "saekit_revival.ghost:Ghost", "Dead latents alone rebuild what the living ones missed.")


@hookimpl
def saekit_callbacks() -> Iterator[Component]:
    yield Component(
        "resample", "saekit_revival.resample:Resample", "Gives dead latents new weights from badly rebuilt inputs."
    )
    yield Component("revivals", "saekit_revival.revivals:Revivals", "Which dead latents come back, and whether they stay.")


@hookimpl
def saekit_recipes() -> Iterator[Component]:
    yield Component("dead_latents", "saekit_revival:comparison.toml", "Methods of revival beside none, on known directions.")
