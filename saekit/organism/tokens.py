"""The corpus as tokens, kept in the user's cache directory: gathering and tokenising it anew takes longer than a short training.

A file for each kind of document, named by what its content follows from: the sources that the corpus is cut from, the code
that cuts it, the version of Python, and the tokenizer. One that is damaged is written again. Where nothing can be written, the
tokens are made each time.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

import torch

from saekit import organism
from saekit.activations.packing import TokenStore, tokenise
from saekit.activations.prepared import prepared
from saekit.organism.corpus import library_sources

SPLITS = ("train", "held_out")
FORMAT = 1
"""Raised when the content of the files changes."""
_COLUMNS = ("ids", "offsets", "hashes")


def corpus_tokens(kind: str, tokenizer: Any) -> dict[str, TokenStore]:
    """The documents of a kind as tokens, for each split. They are read from the cache if they are there."""
    tensors = prepared(
        kind, {"digest": _made_of(kind, tokenizer)}, lambda _: _columns(_tokenised(kind, tokenizer)), directory=cache_directory()
    )
    return {split: TokenStore(*(tensors[f"{split}.{name}"].numpy() for name in _COLUMNS)) for split in SPLITS}


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


def _columns(stores: dict[str, TokenStore]) -> dict[str, torch.Tensor]:
    columns = {f"{split}.{name}": getattr(store, name) for split, store in stores.items() for name in _COLUMNS}
    return {name: torch.from_numpy(column) for name, column in columns.items()}
