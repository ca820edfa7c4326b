"""`saekit import`."""

from __future__ import annotations

from pathlib import Path

import click

from saekit.errors import UsageError
from saekit.files import given_path
from saekit.terminal.output import echo

LIBRARIES = ("sae_lens", "dictionary_learning", "sparsify")


@click.command("import")
@click.argument("source", metavar="DIRECTORY|RELEASE:SAE_ID")
@click.argument("directory", metavar="NEW_DIRECTORY")
@click.option("--from", "library", type=click.Choice(LIBRARIES), help="The library that wrote the files; recognised by default.")
@click.option(
    "--mean-norm",
    type=click.FloatRange(min=0, min_open=True),
    help="Mean norm of the raw activations, for an SAE of sae_lens that scales them by a factor its files do not keep.",
)
def command(source: str, directory: str, library: str | None, mean_norm: float | None) -> None:
    """Convert an SAE of another library into one of saekit, and print the new directory.

    RELEASE:SAE_ID is a release that sae_lens lists, or a repository on the Hugging Face hub in its layout. It is downloaded.
    """
    from saekit.plugins import Registry
    from saekit.sae import interop
    from saekit.sae.formats import open_sae, save_sae

    target, place = empty_directory(directory), given_path(source)
    release = interop.release_of(source)
    if library not in (None, interop.sae_lens.LIBRARY) and (release or mean_norm is not None):
        what = "a release" if release else "--mean-norm"
        raise UsageError(f"{what} goes with --from {interop.sae_lens.LIBRARY}, not with {library}.")
    if not release and not place.is_dir():
        raise UsageError(f"{source}: there is no such directory.")
    wanted = library or "any of " + ", ".join(LIBRARIES)
    library = library or (interop.sae_lens.LIBRARY if release else interop.library_of(place))
    if library is None or not (release or interop.FORMATS[library].matches(place)):
        raise UsageError(f"{source}: does not hold the files of {wanted}.")
    if library != interop.sae_lens.LIBRARY:
        saved = interop.take_in(interop.FORMATS[library].read(place), Registry())
    elif mean_norm is None:
        saved = open_sae(source)
    elif release:
        saved = interop.take_in(interop.sae_lens.fetch(*release, mean_norm), Registry())
    else:
        saved = interop.take_in(interop.sae_lens.read(place, mean_norm), Registry())
    save_sae(saved.sae, target, name=saved.name, metadata=saved.metadata)
    echo(f"{saved.name}, {saved.sae.d_in} -> {saved.sae.d_sae} latents", err=True)
    echo(str(target))


def empty_directory(name: str) -> Path:
    """The path `name`, which must be absent or an empty directory."""
    path = given_path(name)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{name}: exists and is not an empty directory. Choose another.")
    return path
