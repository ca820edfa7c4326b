"""`saekit recipes`."""

from __future__ import annotations

import click

from saekit.plugins import Registry
from saekit.terminal.output import echo, listed


@click.command("recipes")
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the ready-made run files, or print one so that it can be saved and changed."""
    registry = Registry()
    if name is not None:
        from saekit.runner.compose import recipe_path

        echo(recipe_path(registry.find("recipe", name)).read_text(encoding="utf-8"), nl=False)
        return
    for component in registry.components("recipe"):
        echo(listed(component.name, component.summary, f"{component.distribution} {component.version}"))
