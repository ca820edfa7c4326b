"""`saekit report`."""

from __future__ import annotations

from pathlib import Path

import click

from saekit.terminal.output import echo


@click.command("report")
@click.argument("run", metavar="RUN")
def command(run: str) -> None:
    """Rebuild the report.html of the run directory RUN and print its path."""
    from saekit.report import write_report
    from saekit.run_directory import RunDirectory

    with RunDirectory.at(run).locked():
        echo(str(write_report(Path(run))))
