"""The corpus as tokens, kept in the user's cache directory: gathering and tokenising it anew takes longer than a short training.

A file for each kind of document, named by what its content follows from: the sources that the corpus is cut from, the code
that cuts it, the version of Python, and the tokenizer. One that is damaged is written again. Where nothing can be written, the
tokens are made each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

from saekit import organism
from saekit.activations.packing import TokenStore, tokenise
from saekit.checked_tensors import load_checked, save_checked
from saekit.errors import SaekitError
from saekit.files import TEMPORARY
from saekit.lock import locked
from saekit.organism.corpus import library_sources

SPLITS = ("train", "held_out")
FORMAT = 1
"""Raised when the content of the files changes."""
_KEPT = 4  # files of each kind, the newest: for other versions of Python and of saekit
_COLUMNS = ("ids", "offsets", "hashes")


def corpus_tokens(kind: str, tokenizer: Any) -> dict[str, TokenStore]:
    """The documents of a kind as tokens, for each split. They are read from the cache if they are there."""
    made: dict[str, TokenStore] | None = None
    with contextlib.suppress(OSError, SaekitError):  # it works without a cache, only more slowly
        path = cache_directory() / f"{kind}-{_made_of(kind, tokenizer)}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{kind}.lock"), wait=True):  # of several processes that begin together, one makes it
            found = _read(path)
            if found is not None:
                return found
            made = _tokenised(kind, tokenizer)
            _write(path, made)
            _tidy(path.parent, kind)
    return made or _tokenised(kind, tokenizer)


def cache_directory() -> Path:
    """Where the files are: `organism/` in saekit's directory in the user's cache."""
    import platformdirs

    return platformdirs.user_cache_path("saekit", appauthor=False) / "organism"


def _tokenised(kind: str, tokenizer: Any) -> dict[str, TokenStore]:
    return {split: tokenise(organism.documents(split, [kind]), tokenizer) for split in SPLITS}


def _made_of(kind: str, tokenizer: Any) -> str:
    """A digest of everything that the tokens of a kind follow from."""
    own = Path(organism.__file__).parent
    digest = hashlib.sha256(f"{FORMAT}\0{platform.python_version()}\0{tokenizer.eos_token_id}\0".encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for path in sorted([*own.glob("*.py"), *own.glob("*.txt")]):
        digest.update(path.read_bytes())
    if kind in ("code", "prose"):
        for name, path in library_sources():
            digest.update(f"\0{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _read(path: Path) -> dict[str, TokenStore] | None:
    try:
        tensors, facts = load_checked(path)
    except SaekitError:  # absent or damaged
        return None
    if facts is None:
        return None
    return {split: TokenStore(*(tensors[f"{split}.{name}"].numpy() for name in _COLUMNS)) for split in SPLITS}


def _write(path: Path, stores: dict[str, TokenStore]) -> None:
    columns = {f"{split}.{name}": getattr(store, name) for split, store in stores.items() for name in _COLUMNS}
    save_checked(path, {name: torch.from_numpy(column) for name, column in columns.items()}, {})


def _tidy(directory: Path, kind: str) -> None:
    """Remove what killed processes left behind, and all but the newest files of a kind. The caller holds its lock."""
    written = sorted(directory.glob(f"{kind}-*.safetensors"), key=os.path.getmtime, reverse=True)
    for path in (*written[_KEPT:], *directory.glob(f".{kind}-{TEMPORARY.removeprefix('.')}")):
        path.unlink(missing_ok=True)
