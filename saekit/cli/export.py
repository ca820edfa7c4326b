"""`saekit export`."""

from __future__ import annotations

import click

from saekit.cli.import_ import LIBRARIES, empty_directory
from saekit.errors import UsageError
from saekit.files import given_path
from saekit.terminal.output import echo


@click.command("export")
@click.argument("source", metavar="RUN|DIRECTORY")
@click.argument("directory", metavar="NEW_DIRECTORY")
@click.option("--to", "library", type=click.Choice(LIBRARIES), required=True, help="The library that should open it.")
def command(source: str, directory: str, library: str) -> None:
    """Write an SAE, from a run or a directory, in the files of another library, and print the new directory.

    The SAE computes the same there. If the library has no such architecture, it is refused.
    """
    from saekit.sae import interop
    from saekit.sae.formats import open_sae

    target = empty_directory(directory)
    interop.FORMATS[library].write(open_sae(sae_of(source)), target)
    echo(str(target))


def sae_of(source: str) -> str:
    """The directory of an SAE: `source` itself, or the `sae/` of the run `source`."""
    from saekit.run_directory import RunDirectory

    run = RunDirectory(given_path(source))
    if run.sae.is_dir():
        return str(run.sae)
    if run.run_toml.is_file():
        raise UsageError(f"{source}: the run has no sae/ yet. Finish it with: saekit run --resume {source}")
    return source
