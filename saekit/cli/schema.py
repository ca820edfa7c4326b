"""`saekit schema`."""

from __future__ import annotations

import json

import click


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of a run file, for editors."""
    from saekit.config import RunConfig

    click.echo(json.dumps(RunConfig.model_json_schema(by_alias=True), indent=2))
