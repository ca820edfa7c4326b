"""Tensors in files, read piece by piece: one tensor of a .safetensors or .npy file, and the chunks of many of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saekit.activations.batch import Activations
from saekit.activations.packing import Passes
from saekit.activations.shuffle import stop_point
from saekit.errors import OptionError, UsageError, near_names

SUFFIXES = (".safetensors", ".npy")
_PIECE, _READ = 1 << 26, 1 << 20  # bytes of a file that one thread digests, and that it reads at once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; only the header has been read. key: its name in the file; "" in a .npy file.

    shape: [n, ...].
    dtype: as in the file."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def name(self) -> str:
        """The file, and the key in it, for messages."""
        return f"{self.path}, {self.key!r}" if self.key else str(self.path)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`: [stop - start, ...].

        The file is mapped into memory for as long as the result lives. The result must not be written to."""
        with _readable(self.path):
            if self.path.suffix == ".npy":
                array = np.load(self.path, mmap_mode="r")[start:stop]
                return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
            from safetensors import safe_open

            with safe_open(self.path, framework="pt") as file:
                return file.get_slice(self.key)[start:stop]


def rows_of(columns: dict[str, StoredTensor], start: int, stop: int) -> dict[str, Tensor]:
    """The same rows of several tensors of one file, which is opened once; see `StoredTensor.rows`."""
    path = next(iter(columns.values())).path
    if path.suffix == ".npy":
        return {name: column.rows(start, stop) for name, column in columns.items()}
    from safetensors import safe_open

    with _readable(path), safe_open(path, framework="pt") as file:
        return {name: file.get_slice(column.key)[start:stop] for name, column in columns.items()}


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """What a file holds, by key ("" in a .npy file). UsageError for a file that is truncated or of another format."""
    with _readable(path):
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
            if array.ndim == 0:
                raise UsageError(f"{path}: holds a single number. Give an array of rows.")
            return {"": StoredTensor(path, "", array.shape, _torch_dtype(array.dtype, path))}
        from safetensors import safe_open

        found = {}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is not a dictionary
                piece = file.get_slice(key)
                shape = tuple(piece.get_shape())
                if shape:
                    found[key] = StoredTensor(path, key, shape, piece[0:0].dtype)
        return found


def stored_tensor(path: Path, key: str, option: str) -> StoredTensor:
    """The tensor `key` of a file. OptionError, with near keys, if there is none; `option` is the option that names it."""
    found = stored_tensors(path)
    if key not in found:
        keys = ", ".join(map(repr, found)) or "none"
        raise OptionError(
            option, f"{path} has no tensor {key!r}.{near_names(key, found)} Its tensors: {keys}. Name one of them."
        )
    return found[key]


def content_digests(paths: Sequence[Path]) -> list[str]:
    """A sha256 of the whole content of each file, from those of its pieces of 64 MB.

    Every byte is read once, by all of the processor's cores: about 1 GB/s for each, unless the disk is slower."""
    sizes = [path.stat().st_size for path in paths]
    pieces = [
        (path, start) for path, size in zip(paths, sizes, strict=True) for start in range(0, max(size, 1), _PIECE)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = iter(pool.map(_piece_digest, pieces))
        return [
            hashlib.sha256(b"".join(next(digests) for _ in range(0, max(size, 1), _PIECE))).hexdigest()
            for size in sizes
        ]


def _piece_digest(piece: tuple[Path, int]) -> bytes:
    path, start = piece
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        for _ in range(0, _PIECE, _READ):
            digest.update(file.read(_READ))
    return digest.digest()


class Chunks:
    """Stretches of at most `size` rows of files with `lengths` rows each, addressed by number.

    files, starts, stops: [C] each; chunk c is the rows `starts[c]` to `stops[c]` of file `files[c]`.
    """

    def __init__(self, lengths: list[int], size: int) -> None:
        pieces = [(f, a, min(a + size, n)) for f, n in enumerate(lengths) for a in range(0, n, size)]
        self._take(np.asarray(pieces, dtype=np.int64).reshape(-1, 3), size)

    def _take(self, table: np.ndarray, size: int) -> None:
        self.table, self.size = table, size
        self.files, self.starts, self.stops = table.T
        self._passes = Passes(len(table), "chunks")

    def __len__(self) -> int:
        return len(self.table)

    def only(self, which: np.ndarray) -> Chunks:
        """Some of the chunks: by [C] booleans in the order that they have, by [n] numbers in that of the numbers."""
        some = Chunks([], self.size)
        some._take(self.table[which], self.size)
        return some

    def blocks(self, rows: int, *, seed: int | None, start: int = 0) -> Iterator[np.ndarray]:
        """The chunks, by number, of block `start`, `start + 1`, ... of about `rows` rows each.

        With a seed it never ends: pass after pass over all chunks, each in an order drawn from (seed, pass). Without
        one every chunk comes once, in order."""
        height, number = max(1, round(rows / self.size)), start
        while seed is not None or number * height < len(self):
            first, last = number * height, (number + 1) * height
            numbers = np.arange(first, last if seed is not None else min(last, len(self)))
            yield numbers if seed is None else self._passes.take(numbers, seed)
            number += 1


def read_blocks(
    chunks: Chunks,
    read: Callable[[int, int, int], Activations],
    *,
    rows: int,
    seed: int | None,
    start: int,
    device: torch.device,
    length: int = 1,
) -> Iterator[Activations]:
    """Block `start`, `start + 1`, ... of chunks (see `Chunks.blocks`), each as one.

    read: from (file, start, stop) to activations, which may be views of mapped files.
    length: activations of a row, at most. Memory: the block, and one mapped chunk."""
    for numbers in chunks.blocks(rows, seed=seed, start=start):
        yield _block(chunks, numbers, read, length).to(device)


def _block(
    chunks: Chunks, numbers: np.ndarray, read: Callable[[int, int, int], Activations], length: int
) -> Activations:
    """Some chunks as one block. It is a function so that no local variable keeps the block after it is handed over."""
    most = length * int((chunks.stops[numbers] - chunks.starts[numbers]).sum())
    columns: dict[str, Tensor] = {}
    done = 0
    for c in numbers:
        stop_point()
        part = read(int(chunks.files[c]), int(chunks.starts[c]), int(chunks.stops[c]))
        for name, tensor in vars(part).items():
            if tensor is not None:
                if name not in columns:
                    columns[name] = torch.empty(most, *tensor.shape[1:], dtype=tensor.dtype)
                columns[name][done : done + len(part)] = tensor
        done += len(part)
        del part, tensor  # and with them the map of the file
    return Activations(**columns).rows(slice(0, done))


def _torch_dtype(dtype: np.dtype[Any], path: Path) -> torch.dtype:
    try:
        return torch.from_numpy(np.empty(0, dtype=dtype.newbyteorder("="))).dtype
    except TypeError:
        raise UsageError(f"{path}: holds {dtype}, which is not a tensor of numbers. Save it as float32.") from None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises about a truncated or unreadable file into a UsageError."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file.") from None
    except (SafetensorError, ValueError, EOFError, OSError) as error:
        raise UsageError(
            f"{path}: is truncated or not a {path.suffix[1:]} file ({path.stat().st_size} bytes; {error}). "
            "Write or download it again."
        ) from None
