"""saekit-bench: the command `saekit bench`."""

from collections.abc import Iterator

from saekit import Command, hookimpl


@hookimpl
def saekit_commands() -> Iterator[Command]:
    summary = "Time a step, the harvest or a whole training against its floor and its peers."
    yield Command("bench", "saekit_bench.cli:command", summary)
