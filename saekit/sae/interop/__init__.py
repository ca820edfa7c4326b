"""SAEs of other libraries: one module a library, each with the same four names.

    LIBRARY           what the library is called on the command line
    matches(directory) -> bool                    whether a directory looks like one of its own
    read(directory) -> Foreign                    what lies there, in sae_lens's words
    write(saved, directory) -> None               the same for an SAE of ours; a UsageError where the library lacks it

The words of sae_lens stand between: a format translates its files into them, an architecture translates them into its
own options and weights (`known_as`, `options_from_saelens`, `state_from_saelens`), so that one that a plugin brings
takes part in every format.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from saekit.sae.interop import dictionary_learning, sae_lens, sparsify
from saekit.sae.interop.foreign import Foreign, take_in

FORMATS: dict[str, ModuleType] = {module.LIBRARY: module for module in (sae_lens, dictionary_learning, sparsify)}


def library_of(directory: Path) -> str | None:
    """The library whose files lie in `directory`, or None where they are nobody's."""
    return next((library for library, module in FORMATS.items() if module.matches(directory)), None)


def release_of(source: str | Path) -> tuple[str, str] | None:
    """(release, sae_id) where `source` is written `RELEASE:SAE_ID` and is no path; else None."""
    release, colon, sae_id = str(source).partition(":")
    if not colon or Path(source).exists() or len(release) < 2:  # a drive has one letter
        return None
    return release, sae_id


__all__ = ["FORMATS", "Foreign", "dictionary_learning", "library_of", "release_of", "sae_lens", "sparsify", "take_in"]
