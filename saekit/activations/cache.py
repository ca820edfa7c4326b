"""The cache: a source's activations in shards on disk, written once and read by any number of runs.

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

import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from saekit.activations.batch import Activations, SequenceBatch, TokenBatch
from saekit.activations.shuffle import stop_point
from saekit.activations.stored import Chunks, StoredTensor, read_blocks, rows_of, stored_tensors
from saekit.checked_tensors import bytes_of
from saekit.errors import OptionError, RunError, UsageError
from saekit.files import TEMPORARY, disk_errors, parse_json, sha256_of, to_jsonable, whole_file, write_json
from saekit.lock import locked
from saekit.protocols import Source
from saekit.seeds import derived_seed

CacheDtype = Literal["float32", "float16", "bfloat16"]
FORMAT = 3
"""Raised when the content of a cache changes, so that an older one is refused instead of misread."""
ENDLESS = "this source's data has no end. Say how much to keep: source.cache_tokens = 1_000_000."
SPLITS = ("train", "held_out")
CHUNK = 1024  # rows read from one place; the rows of a training shard are already shuffled among themselves
_SHARD_BYTES = 1 << 27
_SHARD_ROWS = (1024, 65_536)
_ORDER = 0  # the seed of the order of writing; each run's seed decides the order of reading
_SUMS = "checksums"  # a column of a shard: [chunks] int64, one of each chunk's rows
_WHOLE = ("tokens", "sequence", "position")  # columns of whole numbers, stored in 32 bits


class CachedSource:
    """A source whose activations are read from a directory, after they have been written there once.

    It implements `protocols.Source` and has the optional capabilities of the source that it wraps; those that need the
    model (`subject`, `token_batches`, `sequences`) load it when they are first used. The training split is
    one pass over the source's data, or the first `tokens` activations of it; it is read chunk by chunk, pass after
    pass, in an order drawn from (seed, pass), so block b here is not block b of the source.

    A cache is for one model, hook point, tokenizer, data and set of options: `open` refuses any other, with an error that
    names what differs. Writing that was interrupted continues where it stopped, shard by shard.

    Memory for reading: the block and one mapped chunk. For writing: four times a shard, which takes 128 MB at most (unless
    a single activation takes 128 kB).
    """

    def __init__(
        self, source: Source, directory: str | Path, *, dtype: CacheDtype = "float32", tokens: int | None = None
    ) -> None:
        self.wrapped, self.directory = source, Path(directory).expanduser()
        self.dtype: CacheDtype = dtype
        self.tokens = tokens
        self._opened = False
        self._stored: dict[str, list[dict[str, StoredTensor]]] = {}  # for each split, the columns of each shard
        self._made_of: dict[str, Any] = {}  # the content of source.json
        self._strings: dict[int, str] = {}  # the content of tokens.json
        self._first: Activations | None = None
        self._device, self._dtype = torch.device("cpu"), torch.float32
        if hasattr(source, "withheld"):
            self.withheld = source.withheld
        if hasattr(source, "token_batches"):
            self.token_batches = self._token_batches
        if hasattr(source, "token_strings"):
            self.token_strings = self._token_strings
        if hasattr(source, "sequences"):
            self.sequences = self._sequences
        if hasattr(source, "documents"):
            self.documents = self._documents_of

    def peek(self) -> dict[str, Any]:
        """What the source knows, and whether the cache exists already; see `protocols.Source.peek`.

        OptionError if it would have no end."""
        if self.tokens is None and not hasattr(self.wrapped, "first_pass"):
            raise OptionError("cache", ENDLESS)
        state = "is read" if self._index().is_file() else "is written first"
        found = {**self.wrapped.peek(), "cache": f"{self.directory} {state}"}
        self.warnings = list(getattr(self.wrapped, "warnings", ()))
        return found

    def open(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Check that the cache is this source's. If the fingerprints agree, the source is not loaded."""
        self._device, self._dtype = torch.device(device), dtype
        if self.directory.exists() and not self.directory.is_dir():
            raise OptionError("cache", f"{self.directory} is a file. Name a directory.")
        self._refuse_other()
        if self._index().is_file():
            self._read_index()
        else:
            self._source()  # fail now if the source cannot be opened
        facts = self._made_of.get("facts") or self._facts()
        self.d_in, self.d_out, self.hook_point = facts["d_in"], facts["d_out"], facts["hook_point"]
        for name in ("target_hook_point", "concepts", "special_tokens", "warnings"):
            if name in facts:
                setattr(self, name, facts[name])

    @property
    def missing(self) -> int:
        """About how many activations still have to be written; 0 if the cache is complete."""
        if self._stored:
            return 0
        return max(1, self._expected() - sum(len(shard["x"]) for shard in self._shards("train")))

    def fill(self, advance: Callable[[int], None] = lambda done: None) -> None:
        """Write what is missing. `advance` is told how many activations have been written.

        If another process is writing the same cache, wait for it. OptionError if the disk has too little room."""
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.directory / "lock", wait=True):
            self._refuse_other()
            if not self._index().is_file():
                self._begin()
                written = 0

                def progress(rows: int) -> None:
                    nonlocal written
                    written += rows
                    advance(written)

                shards = {"train": self._write_train(progress), "held_out": self._write_held_out(progress)}
                self._write_token_strings(shards)
                self._write_documents()
                small = {path.name: sha256_of(path) for path in self._small_files() if path.is_file()}
                write_json(self._index(), {"format": FORMAT, "shards": shards, "sha256": small})
        self._read_index()

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """Blocks `start`, `start + 1`, ... of about `size` activations; see `protocols.Source.blocks`."""
        if split not in SPLITS:
            raise UsageError(f"split {split!r}: there are only 'train' and 'held_out'.")
        if not self._stored:
            self.fill()
        stored = self._stored[split]
        chunks = Chunks([len(shard["x"]) for shard in stored], CHUNK)

        def read(file: int, first: int, last: int) -> Activations:
            found: dict[str, Any] = self._whole_chunk(stored[file], first, last)
            for name in found:
                found[name] = found[name].long() if name in _WHOLE else found[name].to(self._dtype)
            return Activations(**found)

        order = seed if split == "train" else None
        yield from read_blocks(chunks, read, rows=size, seed=order, start=start, device=self._device)

    def identity(self) -> dict[str, Any]:
        """The source's identity, and how much is kept in which dtype; see `protocols.Source.identity`."""
        identity = self._made_of.get("identity") or to_jsonable(self._source().identity())
        return {**identity, "cache": {"dtype": self.dtype, "tokens": self.tokens}}

    # --- what needs the source ---------------------------------------------------------------------------------

    @property
    def subject(self) -> Any:
        """The source's subject, loaded when it is first used."""
        return getattr(self._source(), "subject", None)

    @property
    def truth(self) -> Tensor:
        """The true directions. AttributeError if the source does not know them."""
        return self._source().truth

    def _token_batches(self, split: str, *, rows: int) -> Iterator[TokenBatch]:
        return self._source().token_batches(split, rows=rows)

    def _sequences(self, split: str, n: int, seed: int, number: int) -> SequenceBatch:
        return self._source().sequences(split, n, seed, number)

    def _token_strings(self, tokens: Tensor) -> list[str]:
        """Each token id as text. The tokenizer is loaded only for ids that do not occur in the cache."""
        known = self._strings
        new = sorted(set(tokens.tolist()) - known.keys())
        if new:
            known |= dict(zip(new, self._source().token_strings(torch.tensor(new)), strict=True))
        return [known[token] for token in tokens.tolist()]

    def _documents_of(self, sequences: Tensor) -> Tensor:
        """The documents of cached held-out sequences, without loading the source; see `protocols.Source.documents`."""
        table = _read_json(self.directory / "documents.json")
        known = dict(zip(table["sequences"], table["documents"], strict=True))
        return torch.tensor([known[sequence] for sequence in sequences.tolist()], dtype=torch.long).reshape(-1, 2)

    def _source(self) -> Any:
        """The wrapped source, opened."""
        if not self._opened:
            self.wrapped.open(device=self._device, dtype=self._dtype)
            self._opened = True
        return self.wrapped

    # --- the cache's source ------------------------------------------------------------------------------------

    def _index(self) -> Path:
        return self.directory / "index.json"

    def _fingerprint(self) -> dict[str, Any] | None:
        found = self.wrapped.fingerprint() if hasattr(self.wrapped, "fingerprint") else None
        return None if found is None else to_jsonable(found)

    def _facts(self) -> dict[str, Any]:
        """What is known about the opened source, for runs that do not open it."""
        source = self._source()
        names = ("d_in", "d_out", "hook_point", "target_hook_point", "concepts", "special_tokens", "warnings")
        return to_jsonable({name: getattr(source, name) for name in names if hasattr(source, name)})

    def _refuse_other(self) -> None:
        """Read source.json, if there is one. OptionError if it describes other activations than the source's."""
        path = self.directory / "source.json"
        if not path.is_file():
            if any(self.directory.glob("*.safetensors")):
                raise OptionError(
                    "cache", f"{self.directory} holds files, but not a cache. Name an empty directory or a new one."
                )
            return
        made_of = _read_json(path)
        if made_of.get("format") != FORMAT or not made_of.keys() >= {
            "cache_dtype",
            "cache_tokens",
            "identity",
            "facts",
        }:
            raise UsageError(
                f"{path}: has format {made_of.get('format')!r}, and this version of saekit reads {FORMAT}. Name another "
                "directory in source.cache."
            )
        asked: dict[str, Any] = {"cache_dtype": self.dtype, "cache_tokens": self.tokens}
        for key, value in asked.items():
            if made_of[key] != value:
                was = "left out" if made_of[key] is None else repr(made_of[key])
                raise OptionError(
                    "cache",
                    f"{self.directory} was written with source.{key} {was}, not {value!r}. Set it so, or name "
                    "another directory.",
                )
        fingerprint = self._fingerprint()
        if fingerprint is None or fingerprint != made_of.get("fingerprint"):
            was, now = made_of["identity"], to_jsonable(self._source().identity())
            differs = [key for key in {**was, **now} if was.get(key) != now.get(key) and not _by_digest(key, was, now)]
            if differs:
                changes = "; ".join(
                    f"{key} was {_short(was.get(key))} and is {_short(now.get(key))}" for key in differs
                )
                raise OptionError(
                    "cache",
                    f"{self.directory} holds other activations than this source's: {changes}. Name another "
                    "directory, or bring back what it was written from.",
                )
        self._made_of = made_of

    def _begin(self) -> None:
        """Check the room on the disk, write source.json, and remove files that an interrupted run left incomplete."""
        for leftover in self.directory.glob(TEMPORARY):
            leftover.unlink()
        row = sum(t[:1].numel() * t.element_size() for t in self._columns(self._sample()).values())
        need = row * max(0, self._expected() - sum(len(shard["x"]) for shard in self._shards("train")))
        free = shutil.disk_usage(self.directory).free
        if need > free:
            raise OptionError(
                "cache",
                f"{self.directory} has {free / 1e9:.1f} GB of room, and the cache takes {need / 1e9:.1f} GB. "
                'Set source.cache_tokens or source.cache_dtype = "float16", or name a directory on another disk.',
            )
        if not self._made_of:
            self._made_of = {
                "format": FORMAT,
                "cache_dtype": self.dtype,
                "cache_tokens": self.tokens,
                "facts": self._facts(),
                "identity": to_jsonable(self._source().identity()),
                "fingerprint": self._fingerprint(),
            }
            write_json(self.directory / "source.json", self._made_of)

    # --- writing -----------------------------------------------------------------------------------------------

    def _expected(self) -> int:
        """About how many training activations the complete cache holds."""
        whole = getattr(self._source(), "pass_size", None)
        if whole is None and self.tokens is None:
            raise OptionError("cache", ENDLESS)
        return min(n for n in (whole, self.tokens) if n is not None)

    def _shard_rows(self) -> int:
        width = (self._source().d_in + (self.wrapped.d_out if self._has_target() else 0)) * torch_dtype(
            self.dtype
        ).itemsize
        low, high = _SHARD_ROWS
        return max(low, min(high, _SHARD_BYTES // width))

    def _has_target(self) -> bool:
        return self._sample().target is not None

    def _sample(self) -> Activations:
        """One activation, to see which columns there are."""
        if self._first is None:
            block = next(self._source().blocks("train", size=1, seed=_ORDER), None)
            if block is None:
                raise RunError("the source gave no activations to write into the cache. Give more data.")
            self._first = block.rows(slice(0, 1)).map(torch.clone)
        return self._first

    def _write_train(self, progress: Callable[[int], None]) -> list[dict[str, Any]]:
        source, size = self._source(), self._shard_rows()
        shards = self._shards("train")
        done = sum(len(shard["x"]) for shard in shards)
        limit = self.tokens if self.tokens is not None else float("inf")
        if done < limit:
            passing = getattr(source, "first_pass", None)
            blocks = (
                passing(size=size, seed=_ORDER, start=len(shards))
                if passing is not None
                else source.blocks("train", size=size, seed=_ORDER, start=len(shards))
            )
            for number, block in enumerate(blocks, len(shards)):
                generator = torch.Generator().manual_seed(derived_seed("cache", number))
                self._write(
                    "train", number, block.rows(torch.randperm(len(block), generator=generator).to(block.x.device))
                )
                progress(len(block))
                done += len(block)
                if done >= limit:
                    break
        return [_entry(shard) for shard in self._shards("train")]

    def _write_held_out(self, progress: Callable[[int], None]) -> list[dict[str, Any]]:
        """The whole split, but no more than the limit of the training split."""
        done, start = sum(len(shard["x"]) for shard in self._shards("held_out")), len(self._shards("held_out"))
        blocks = self._source().blocks("held_out", size=self._shard_rows(), seed=_ORDER, start=start)
        for number, block in enumerate(blocks, start):
            if self.tokens is not None and done >= self.tokens:
                break
            self._write("held_out", number, block)
            progress(len(block))
            done += len(block)
        return [_entry(shard) for shard in self._shards("held_out")]

    def _write(self, split: str, number: int, block: Activations) -> None:
        from safetensors.torch import save_file

        stop_point()
        columns = self._columns(block)
        if not torch.isfinite(columns["x"]).all() and torch.isfinite(block.x).all():
            raise OptionError(
                "cache_dtype",
                f"activations of {float(block.x.abs().max()):.3g} do not fit into {self.dtype}. Set "
                'source.cache_dtype = "bfloat16" or "float32", and name another directory.',
            )
        with whole_file(self._path(split, number)) as temporary:
            save_file({**columns, _SUMS: _checksums(columns)}, temporary)

    def _columns(self, block: Activations) -> dict[str, Tensor]:
        """A block's columns as they are stored."""
        dtype = torch_dtype(self.dtype)
        columns = {}
        for name, tensor in vars(block).items():
            if tensor is not None:
                kept = torch.int32 if name in _WHOLE else dtype if name in ("x", "target") else tensor.dtype
                columns[name] = tensor.to("cpu", kept).contiguous()
        return columns

    def _write_token_strings(self, shards: dict[str, list[dict[str, Any]]]) -> None:
        ids: set[int] = set()
        for split in SPLITS:
            for shard in self._shards(split):
                if "tokens" in shard:
                    ids.update(shard["tokens"].rows(0, len(shard["tokens"])).unique().tolist())
        if ids and hasattr(self.wrapped, "token_strings"):
            ordered = sorted(ids)
            strings = self._source().token_strings(torch.tensor(ordered))
            write_json(self.directory / "tokens.json", dict(zip(map(str, ordered), strings, strict=True)))

    def _write_documents(self) -> None:
        shards = self._shards("held_out")
        if hasattr(self.wrapped, "documents") and shards and "sequence" in shards[0]:
            sequences = torch.cat([shard["sequence"].rows(0, len(shard["sequence"])) for shard in shards]).unique().long()
            found = self._source().documents(sequences).tolist()
            write_json(self.directory / "documents.json", {"sequences": sequences.tolist(), "documents": found})

    # --- reading -----------------------------------------------------------------------------------------------

    def _path(self, split: str, number: int) -> Path:
        return self.directory / f"{split}-{number:05d}.safetensors"

    def _shards(self, split: str) -> list[dict[str, StoredTensor]]:
        """The columns of the shards that have been written. UsageError for a truncated one."""
        found: list[dict[str, StoredTensor]] = []
        while (path := self._path(split, len(found))).is_file():
            found.append(self._columns_of(path))
        return found

    def _columns_of(self, path: Path) -> dict[str, StoredTensor]:
        """The columns of a shard by name. UsageError if they are not those of one."""
        found = stored_tensors(path)
        names = {*Activations.__dataclass_fields__, _SUMS}
        if not {"x", _SUMS} <= found.keys() <= names or len({len(t) for name, t in found.items() if name != _SUMS}) != 1:
            raise UsageError(self._damaged(path, f"has the columns {', '.join(found)}"))
        return found

    def _whole_chunk(self, shard: dict[str, StoredTensor], start: int, stop: int) -> dict[str, Tensor]:
        """The rows of one chunk. UsageError if they are not those that were written."""
        columns = {name: column for name, column in shard.items() if name != _SUMS}
        found = rows_of(columns, start, stop)
        kept = shard[_SUMS].rows(start // CHUNK, start // CHUNK + 1)
        if kept.tolist() != [_checksum(found)]:
            raise UsageError(self._damaged(shard["x"].path, f"rows {start} to {stop} are not those that were written"))
        return found

    def _damaged(self, path: Path, what: str) -> str:
        return f"{path}: is damaged: {what}. Remove {self._index()} and this file to have it written again."

    def _small_files(self) -> list[Path]:
        return [self.directory / name for name in ("source.json", "tokens.json", "documents.json")]

    def _read_index(self) -> None:
        """The shards that index.json lists. UsageError if one is missing or was changed."""
        index = _read_json(self._index())
        again = f"Remove {self._index()} to have it written again."
        if index.keys() != {"format", "shards", "sha256"} or index["format"] != FORMAT:
            raise UsageError(f"{self._index()}: is damaged, or of another version of saekit. {again}")
        small = {path.name: sha256_of(path) for path in self._small_files() if path.is_file()}
        for name in {**small, **index["sha256"]}:
            if small.get(name) != index["sha256"].get(name):
                raise UsageError(
                    f"{self.directory / name}: has changed since the cache was written (its checksum is in {self._index()}). "
                    "Bring it back, or remove the cache to have it written again."
                )
        stored: dict[str, list[dict[str, StoredTensor]]] = {}
        for split in SPLITS:
            stored[split] = []
            for number, entry in enumerate(index["shards"].get(split, ())):
                path = self._path(split, number)
                size = path.stat().st_size if path.is_file() else None
                if size is None:
                    raise UsageError(f"{path}: is missing. {again}")
                if size != entry.get("bytes"):
                    raise UsageError(self._damaged(path, f"it has {size} bytes of {entry.get('bytes')}"))
                stored[split].append(self._columns_of(path))
                if _entry(stored[split][-1]) != entry:
                    raise UsageError(f"{self._index()}: is damaged: its entry of {path.name} is another shard's. {again}")
            if len(stored[split]) != len(list(self.directory.glob(f"{split}-*.safetensors"))):
                raise UsageError(f"{self._index()}: is damaged: it does not list every shard of {split}. {again}")
        self._stored = stored
        strings = self.directory / "tokens.json"
        table = _read_json(strings) if strings.is_file() else {}
        self._strings = {int(token): text for token, text in table.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name such as `float16`."""
    return getattr(torch, name)


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


def _entry(shard: dict[str, StoredTensor]) -> dict[str, Any]:
    path = shard["x"].path
    return {"file": path.name, "rows": len(shard["x"]), "bytes": path.stat().st_size}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}. Remove the cache to have it written again.") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: is not part of a cache. Name another directory in source.cache.")
    return found


def _by_digest(key: str, *identities: dict[str, Any]) -> bool:
    """Whether both identities have a digest for this key; then the same thing may have another name."""
    return all(f"{key}_digest" in identity for identity in identities)


def _short(value: Any) -> str:
    text = "not given" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
