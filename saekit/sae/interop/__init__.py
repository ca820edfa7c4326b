"""The SAEs of other libraries: one module for each library, with the same four names in each.

    LIBRARY                            what the library is called on the command line
    matches(directory) -> bool         whether a directory holds its files
    read(directory) -> Foreign         the SAE in the directory, in the words of sae_lens
    write(saved, directory) -> None    one of our SAEs in its format; UsageError if the library cannot compute the same

The words of sae_lens are the common language. A module here translates a library's files into them, and the `SaeLensFormat` of
an architecture translates them into its options and weights. So an architecture from a plugin takes part in every library.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from saekit.sae.interop import dictionary_learning, sae_lens, sparsify
from saekit.sae.interop.foreign import Foreign, take_in

FORMATS: dict[str, ModuleType] = {module.LIBRARY: module for module in (sae_lens, dictionary_learning, sparsify)}


def library_of(directory: Path) -> str | None:
    """The library whose files are in `directory`, or None."""
    return next((library for library, module in FORMATS.items() if module.matches(directory)), None)


def release_of(source: str | Path) -> tuple[str, str] | None:
    """(release, sae_id) if `source` is written `RELEASE:SAE_ID` and is not a path, else None."""
    release, colon, sae_id = str(source).partition(":")
    if not colon or Path(source).exists() or len(release) < 2:  # one letter is a drive
        return None
    return release, sae_id


__all__ = ["FORMATS", "Foreign", "dictionary_learning", "library_of", "release_of", "sae_lens", "sparsify", "take_in"]
