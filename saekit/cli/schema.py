"""`saekit schema`."""

from __future__ import annotations

import click

from saekit.terminal.output import echo_json


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of a run file, for editors."""
    from saekit.config import RunConfig

    echo_json(RunConfig.model_json_schema(by_alias=True))
