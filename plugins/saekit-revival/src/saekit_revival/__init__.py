"""saekit-revival: revives dead latents."""

from collections.abc import Iterator

from saekit import Component, hookimpl


@hookimpl
def saekit_callbacks() -> Iterator[Component]:
    yield Component(
        "resample", "saekit_revival.resample:Resample", "Gives dead latents new weights from badly rebuilt inputs."
    )
