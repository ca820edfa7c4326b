"""The files of a cache, and the checks that they are whole and unchanged.

DIR/source.json                 what the activations are made of; written first
DIR/train-00000.safetensors     shards, each whole or absent; the rows of a training shard are shuffled
DIR/held_out-00000.safetensors  held-out shards keep the order in which the source gives them
DIR/documents.json              the first and the last document of each held-out sequence, if the source knows them
DIR/tokens.json                 the text of each token that occurs
DIR/index.json                  the shards, and the SHA-256 of the other small files; written last, so that its presence means
                                that everything is there

Each shard has the CRC-32 of every chunk of its rows, which is compared when the chunk is read.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.activations.batch import Activations
from saekit.activations.stored import Chunks, StoredTensor, rows_of, stored_tensors
from saekit.checked_tensors import bytes_of
from saekit.errors import UsageError
from saekit.files import parse_json, sha256_of, whole_file, write_json

FORMAT = 3
"""Raised when the content of a cache changes, so that an older one is refused instead of misread."""
SPLITS = ("train", "held_out")
CHUNK = 1024  # rows read from one place; the rows of a training shard are already shuffled among themselves
_SUMS = "checksums"  # a column of a shard: [chunks] int64, one of each chunk's rows

Shard = dict[str, StoredTensor]
"""The columns of a shard by name."""


class CacheFiles:
    """The files of one cache. UsageError, with the file and how to mend it, for one that is damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source, self.tokens, self.documents, self.index = (
            directory / f"{name}.json" for name in ("source", "tokens", "documents", "index")
        )

    def path(self, split: str, number: int) -> Path:
        """The file of a shard."""
        return self.directory / f"{split}-{number:05d}.safetensors"

    # --- writing -----------------------------------------------------------------------------------------------

    def write_shard(self, split: str, number: int, columns: dict[str, Tensor]) -> None:
        """Write one shard: all of it, or nothing."""
        from safetensors.torch import save_file

        with whole_file(self.path(split, number)) as temporary:
            save_file({**columns, _SUMS: _checksums(columns)}, temporary)

    def write_index(self) -> None:
        """Say that everything is there."""
        shards = {split: [_entry(shard) for shard in self.shards(split)] for split in SPLITS}
        write_json(self.index, {"format": FORMAT, "shards": shards, "sha256": self._sha256_of_small_files()})

    # --- reading -----------------------------------------------------------------------------------------------

    def shards(self, split: str) -> list[Shard]:
        """The columns of the shards that have been written. UsageError for a truncated one."""
        found: list[Shard] = []
        while (path := self.path(split, len(found))).is_file():
            found.append(self._columns_of(path))
        return found

    def _columns_of(self, path: Path) -> Shard:
        """The columns of a shard by name. UsageError if they are not those of one."""
        found = stored_tensors(path)
        names = {*Activations.__dataclass_fields__, _SUMS}
        if not {"x", _SUMS} <= found.keys() <= names or len({len(t) for name, t in found.items() if name != _SUMS}) != 1:
            raise UsageError(self._damaged(path, f"has the columns {', '.join(found)}"))
        return found

    def whole_chunk(self, shard: Shard, start: int, stop: int) -> dict[str, Tensor]:
        """The rows of one chunk. UsageError if they are not those that were written."""
        columns = {name: column for name, column in shard.items() if name != _SUMS}
        found = rows_of(columns, start, stop)
        kept = shard[_SUMS].rows(start // CHUNK, start // CHUNK + 1)
        if kept.tolist() != [_checksum(found)]:
            raise UsageError(self._damaged(shard["x"].path, f"rows {start} to {stop} are not those that were written"))
        return found

    def _damaged(self, path: Path, what: str) -> str:
        return f"{path}: is damaged: {what}. Remove {self.index} and this file to have it written again."

    def _sha256_of_small_files(self) -> dict[str, str]:
        return {path.name: sha256_of(path) for path in (self.source, self.tokens, self.documents) if path.is_file()}

    def indexed_shards(self) -> dict[str, list[Shard]]:
        """The shards that index.json lists, for each split. UsageError if a file is missing or was changed."""
        index = read_json(self.index)
        again = f"Remove {self.index} to have it written again."
        if index.keys() != {"format", "shards", "sha256"} or index["format"] != FORMAT:
            raise UsageError(f"{self.index}: is damaged, or of another version of saekit. {again}")
        small = self._sha256_of_small_files()
        for name in {**small, **index["sha256"]}:
            if small.get(name) != index["sha256"].get(name):
                raise UsageError(
                    f"{self.directory / name}: has changed since the cache was written (its checksum is in {self.index}). "
                    "Bring it back, or remove the cache to have it written again."
                )
        stored: dict[str, list[Shard]] = {}
        for split in SPLITS:
            stored[split] = []
            for number, entry in enumerate(index["shards"].get(split, ())):
                path = self.path(split, number)
                size = path.stat().st_size if path.is_file() else None
                if size is None:
                    raise UsageError(f"{path}: is missing. {again}")
                if size != entry.get("bytes"):
                    raise UsageError(self._damaged(path, f"it has {size} bytes of {entry.get('bytes')}"))
                stored[split].append(self._columns_of(path))
                if _entry(stored[split][-1]) != entry:
                    raise UsageError(f"{self.index}: is damaged: its entry of {path.name} is another shard's. {again}")
            if len(stored[split]) != len(list(self.directory.glob(f"{split}-*.safetensors"))):
                raise UsageError(f"{self.index}: is damaged: it does not list every shard of {split}. {again}")
        return stored


def chunks_of(shards: list[Shard]) -> Chunks:
    """What is read at once of some shards."""
    return Chunks([len(shard["x"]) for shard in shards], CHUNK)


def _checksums(columns: dict[str, Tensor]) -> Tensor:
    """The checksum of each chunk of rows: [chunks] int64."""
    starts = range(0, len(columns["x"]), CHUNK)
    chunks = ({name: column[start : start + CHUNK] for name, column in columns.items()} for start in starts)
    return torch.tensor([_checksum(chunk) for chunk in chunks], dtype=torch.int64)


def _checksum(columns: dict[str, Tensor]) -> int:
    """CRC-32 of some rows' columns: 4 GB/s, against the 0.9 of SHA-256. It finds damage, not forgery."""
    value = 0
    for name, column in sorted(columns.items()):
        value = zlib.crc32(f"{name} {column.dtype} {list(column.shape)}".encode(), value)
        value = zlib.crc32(bytes_of(column), value)
    return value


def _entry(shard: Shard) -> dict[str, Any]:
    path = shard["x"].path
    return {"file": path.name, "rows": len(shard["x"]), "bytes": path.stat().st_size}


def read_json(path: Path) -> dict[str, Any]:
    """The content of one of the small files. UsageError if it has none."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}. Remove the cache to have it written again.") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: is not part of a cache. Name another directory in source.cache.")
    return found
