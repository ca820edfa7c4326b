"""The cache: a source's activations in files, written once and read by any number of runs; see `cache_files`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from saekit.activations.batch import Activations, RunBatch, SequenceBatch, TokenBatch
from saekit.activations.cache_files import FORMAT, SPLITS, CacheFiles, Shard, chunks_of, read_json
from saekit.activations.shuffle import stop_point
from saekit.activations.stored import read_blocks
from saekit.errors import OptionError, RunError, UsageError
from saekit.examples import Example
from saekit.files import TEMPORARY, disk_errors, to_jsonable, write_json
from saekit.lock import locked
from saekit.protocols import Source
from saekit.seeds import derived_seed

CacheDtype = Literal["float32", "float16", "bfloat16"]
ENDLESS = "this source's data has no end. Say how much to keep: source.cache_tokens = 1_000_000."
_SHARD_BYTES = 1 << 27
_SHARD_ROWS = (1024, 65_536)
_ORDER = 0  # the seed of the order of writing; each run's seed decides the order of reading
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
        self._files = CacheFiles(self.directory)
        self.dtype: CacheDtype = dtype
        self.tokens = tokens
        self._opened = False
        self._stored: dict[str, list[Shard]] = {}  # for each split
        self._made_of: dict[str, Any] = {}  # the content of source.json
        self._strings: dict[int, str] = {}  # the content of tokens.json
        self._first: Activations | None = None
        self._device, self._dtype = torch.device("cpu"), torch.float32
        if hasattr(source, "withheld"):
            self.withheld = source.withheld
        if hasattr(source, "token_batches"):
            self.token_batches = self._token_batches
        if hasattr(source, "token_strings"):
            self.token_strings = self._token_strings  # tokens are in the cache, so that nothing is loaded to show them
        elif hasattr(source, "examples"):
            self.examples = self._examples
        if hasattr(source, "sequences"):
            self.sequences = self._sequences
        if hasattr(source, "runs"):
            self.runs = self._runs
        if hasattr(source, "documents"):
            self.documents = self._documents_of

    def peek(self) -> dict[str, Any]:
        """What the source knows, and whether the cache exists already; see `protocols.Source.peek`.

        OptionError if it would have no end."""
        if self.tokens is None and not hasattr(self.wrapped, "first_pass"):
            raise OptionError("cache", ENDLESS)
        state = "is read" if self._files.index.is_file() else "is written first"
        found = {**self.wrapped.peek(), "cache": f"{self.directory} {state}"}
        self.warnings = list(getattr(self.wrapped, "warnings", ()))
        return found

    def open(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Check that the cache is this source's. If the fingerprints agree, the source is not loaded."""
        self._device, self._dtype = torch.device(device), dtype
        if self.directory.exists() and not self.directory.is_dir():
            raise OptionError("cache", f"{self.directory} is a file. Name a directory.")
        self._refuse_other()
        if self._files.index.is_file():
            self._read()
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
        return max(1, self._expected() - sum(len(shard["x"]) for shard in self._files.shards("train")))

    def fill(self, advance: Callable[[int], None] = lambda done: None) -> None:
        """Write what is missing. `advance` is told how many activations have been written.

        If another process is writing the same cache, wait for it. OptionError if the disk has too little room."""
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.directory / "lock", wait=True):
            self._refuse_other()
            if not self._files.index.is_file():
                self._begin()
                written = 0

                def progress(rows: int) -> None:
                    nonlocal written
                    written += rows
                    advance(written)

                self._write_train(progress)
                self._write_held_out(progress)
                self._write_token_strings()
                self._write_documents()
                self._files.write_index()
        self._read()

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """Blocks `start`, `start + 1`, ... of about `size` activations; see `protocols.Source.blocks`."""
        if split not in SPLITS:
            raise UsageError(f"split {split!r}: there are only 'train' and 'held_out'.")
        if not self._stored:
            self.fill()
        stored = self._stored[split]

        def read(file: int, first: int, last: int) -> Activations:
            found: dict[str, Any] = self._files.whole_chunk(stored[file], first, last)
            for name in found:
                found[name] = found[name].long() if name in _WHOLE else found[name].to(self._dtype)
            return Activations(**found)

        order = seed if split == "train" else None
        yield from read_blocks(chunks_of(stored), read, rows=size, seed=order, start=start, device=self._device)

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

    def _runs(self, split: str) -> Iterator[RunBatch]:
        return self._source().runs(split)

    def _examples(self, sequence: Tensor, position: Tensor) -> list[Example]:
        return self._source().examples(sequence, position)

    def _token_strings(self, tokens: Tensor) -> list[str]:
        """Each token id as text. The tokenizer is loaded only for ids that do not occur in the cache."""
        known = self._strings
        new = sorted(set(tokens.tolist()) - known.keys())
        if new:
            known |= dict(zip(new, self._source().token_strings(torch.tensor(new)), strict=True))
        return [known[token] for token in tokens.tolist()]

    def _documents_of(self, sequences: Tensor) -> Tensor:
        """The documents of cached held-out sequences, without loading the source; see `protocols.Source.documents`."""
        table = read_json(self._files.documents)
        known = dict(zip(table["sequences"], table["documents"], strict=True))
        return torch.tensor([known[sequence] for sequence in sequences.tolist()], dtype=torch.long).reshape(-1, 2)

    def _source(self) -> Any:
        """The wrapped source, opened."""
        if not self._opened:
            self.wrapped.open(device=self._device, dtype=self._dtype)
            self._opened = True
        return self.wrapped

    def _read(self) -> None:
        """Look at what has been written. UsageError if a file is missing or was changed."""
        self._stored = self._files.indexed_shards()
        strings = read_json(self._files.tokens) if self._files.tokens.is_file() else {}
        self._strings = {int(token): text for token, text in strings.items()}

    # --- the cache's source ------------------------------------------------------------------------------------

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
        path = self._files.source
        if not path.is_file():
            if any(self.directory.glob("*.safetensors")):
                raise OptionError(
                    "cache", f"{self.directory} holds files, but not a cache. Name an empty directory or a new one."
                )
            return
        made_of = read_json(path)
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
        need = row * max(0, self._expected() - sum(len(shard["x"]) for shard in self._files.shards("train")))
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
            write_json(self._files.source, self._made_of)

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

    def _write_train(self, progress: Callable[[int], None]) -> None:
        source, size = self._source(), self._shard_rows()
        shards = self._files.shards("train")
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

    def _write_held_out(self, progress: Callable[[int], None]) -> None:
        """The whole split, but no more than the limit of the training split."""
        done, start = sum(len(shard["x"]) for shard in self._files.shards("held_out")), len(self._files.shards("held_out"))
        blocks = self._source().blocks("held_out", size=self._shard_rows(), seed=_ORDER, start=start)
        for number, block in enumerate(blocks, start):
            if self.tokens is not None and done >= self.tokens:
                break
            self._write("held_out", number, block)
            progress(len(block))
            done += len(block)

    def _write(self, split: str, number: int, block: Activations) -> None:
        stop_point()
        columns = self._columns(block)
        if not torch.isfinite(columns["x"]).all() and torch.isfinite(block.x).all():
            raise OptionError(
                "cache_dtype",
                f"activations of {float(block.x.abs().max()):.3g} do not fit into {self.dtype}. Set "
                'source.cache_dtype = "bfloat16" or "float32", and name another directory.',
            )
        self._files.write_shard(split, number, columns)

    def _columns(self, block: Activations) -> dict[str, Tensor]:
        """A block's columns as they are stored."""
        dtype = torch_dtype(self.dtype)
        columns = {}
        for name, tensor in vars(block).items():
            if tensor is not None:
                kept = torch.int32 if name in _WHOLE else dtype if name in ("x", "target") else tensor.dtype
                columns[name] = tensor.to("cpu", kept).contiguous()
        return columns

    def _write_token_strings(self) -> None:
        ids: set[int] = set()
        for split in SPLITS:
            for shard in self._files.shards(split):
                if "tokens" in shard:
                    ids.update(shard["tokens"].rows(0, len(shard["tokens"])).unique().tolist())
        if ids and hasattr(self.wrapped, "token_strings"):
            ordered = sorted(ids)
            strings = self._source().token_strings(torch.tensor(ordered))
            write_json(self._files.tokens, dict(zip(map(str, ordered), strings, strict=True)))

    def _write_documents(self) -> None:
        shards = self._files.shards("held_out")
        if hasattr(self.wrapped, "documents") and shards and "sequence" in shards[0]:
            sequences = torch.cat([shard["sequence"].rows(0, len(shard["sequence"])) for shard in shards]).unique().long()
            found = self._source().documents(sequences).tolist()
            write_json(self._files.documents, {"sequences": sequences.tolist(), "documents": found})


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name such as `float16`."""
    return getattr(torch, name)


def _by_digest(key: str, *identities: dict[str, Any]) -> bool:
    """Whether both identities have a digest for this key; then the same thing may have another name."""
    return all(f"{key}_digest" in identity for identity in identities)


def _short(value: Any) -> str:
    text = "not given" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
