"""saekit-gear: a model that completes gear sets whose structure is known, and a recipe that looks for it in its pooled vector."""

from collections.abc import Iterator

from saekit import Component, hookimpl


@hookimpl
def saekit_recipes() -> Iterator[Component]:
    yield Component(
        "gear",
        "saekit_gear:recipes/gear.toml",
        "Gear sets with planted archetypes, weapon classes and combinations: which of them single latents find, and what they do.",
    )
