"""`saekit report`."""

from __future__ import annotations

from pathlib import Path

import click

from saekit.errors import UsageError


@click.command("report")
@click.argument("run", metavar="RUN")
def command(run: str) -> None:
    """Build report.html of the run directory RUN again and print its path."""
    from saekit.report import write_report

    path = Path(run)
    if not (path / "run.toml").is_file():
        raise UsageError(f"{run}: is not a run directory (it has no run.toml).")
    click.echo(str(write_report(path)))
