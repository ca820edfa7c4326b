"""The source `tensors`: activations that any program has stored in files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from saekit.activations.batch import Activations, SequenceBatch
from saekit.activations.documents import find_files
from saekit.activations.packing import Passes, held_out_order
from saekit.activations.stored import (
    SUFFIXES,
    Chunks,
    StoredTensor,
    content_digests,
    read_blocks,
    rows_of,
    stored_tensor,
)
from saekit.errors import OptionError, UsageError
from saekit.seeds import derived_seed

_SCAN = 1 << 16  # labels that are read together


class TensorsSource:
    """Activations in .safetensors or .npy files: [n, d], or [n, T, d] for n sequences of T positions.

    Files are mapped into memory and read chunk by chunk; a pass over the training data takes the chunks of all files
    in an order drawn from (seed, pass), and what a shuffle block holds is then shuffled row by row. So a block should
    hold many chunks: keep `chunk` well below `training.buffer`, and smaller still if neighbouring rows are much alike.

    A share of the chunks, or of the files, is held out, spread evenly. If rows [n, d] of one text lie next to each other,
    held-out chunks border on training data: hold out files instead, or store [n, T, d]. Held-out chunks are taken in an
    order that is the same for every run, so that the first of them come from all over the data.

    Memory: the block and one mapped chunk. When a run begins or goes on, all files are read once for a digest of what is in
    them (1 GB/s for each core, unless the disk is slower), so that a run never goes on with other data; all labels, too.
    """

    subject = None
    hook_point = None

    def __init__(
        self,
        *,
        data: Annotated[str, Field(description="A .safetensors or .npy file, a directory or glob of them.")],
        key: Annotated[str, Field(description="The tensor of activations in a .safetensors file.")] = "activations",
        target: Annotated[str | None, Field(description="For a transcoder: the tensor to rebuild.")] = None,
        labels: Annotated[
            str | None, Field(description="The tensor of labels, [n] or [n, concepts]: 0, 1, or NaN if unknown.")
        ] = None,
        tokens: Annotated[str | None, Field(description="The tensor of token ids, [n] or [n, T].")] = None,
        mask: Annotated[str | None, Field(description="The tensor [n, T] that is 0 at padding.")] = None,
        concepts: Annotated[list[str] | None, Field(description="Names of the columns of labels.")] = None,
        chunk: Annotated[int, Field(gt=0, description="Activations that are read from one place.")] = 1024,
        held_out: Annotated[float, Field(gt=0, lt=1, description="The share to hold out.")] = 0.05,
        held_out_by: Annotated[Literal["chunk", "file"], Field(description="What to hold out a share of.")] = "chunk",
    ) -> None:
        self.data, self.key = data, key
        self._optional = {"target": target, "labels": labels, "tokens": tokens, "mask": mask}
        self.chunk, self.held_out, self.held_out_by = chunk, held_out, held_out_by
        self.concepts = concepts or []
        self.warnings: list[str] = []
        self._digests: list[str] = []

    @property
    def withheld(self) -> dict[str, str]:
        """What these files and options do not provide; see `protocols.Source`."""
        found = {}
        if self._optional["labels"] is None:
            found = dict.fromkeys(("labels", "sequences"), "Name the tensor of labels in source.labels.")
        elif len(self._columns(self._files[0])["x"].shape) == 2:
            found["sequences"] = f"The activations are [n, d]; store sequences, as [n, T, d], under {self.key!r}."
        if self._optional["tokens"] is None:
            found["tokens"] = "Name the tensor of token ids in source.tokens."
        if self._optional["target"] is None:
            found["target"] = "For a transcoder, name the tensor to rebuild in source.target."
        return found

    def peek(self) -> dict[str, Any]:
        """The widths, from the first file's header; see `protocols.Source.peek`."""
        first = self._columns(self._files[0])
        return {"d_in": first["x"].shape[-1], "d_out": first.get("target", first["x"]).shape[-1], "data": self.data}

    def open(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Read the headers of all files, and check the labels."""
        self._device, self._dtype = torch.device(device), dtype
        self._stored = [self._columns(path) for path in self._files]  # every file's columns by name
        for columns in self._stored[1:]:
            self._agree(self._stored[0], columns)
        self.d_in, self.d_out = (self.peek()[name] for name in ("d_in", "d_out"))
        lengths = [len(columns["x"]) for columns in self._stored]
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])  # [files + 1], numbers of the rows of the first axis
        shape = self._stored[0]["x"].shape
        self._length = shape[1] if len(shape) == 3 else 0  # positions of a sequence; 0 if there are no sequences
        chunks = Chunks(lengths, max(1, self.chunk // (self._length or 1)))
        held_out = self._held_out(chunks)
        self._splits = {"train": chunks.only(~held_out), "held_out": chunks.only(held_out)}
        if "labels" in self._stored[0]:
            self._look_through_labels()

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """Blocks `start`, `start + 1`, ... of about `size` activations; see `protocols.Source.blocks`."""
        chunks, order = self._split(split), seed if split == "train" else None
        if split == "held_out":
            chunks = chunks.only(held_out_order(len(chunks)))
        length = self._length or 1
        rows = max(1, size // length)
        yield from read_blocks(
            chunks, self._rows, rows=rows, seed=order, start=start, device=self._device, length=length
        )

    def sequences(self, split: str, n: int, seed: int, number: int) -> SequenceBatch:
        """Batch `number` of `n` labelled sequences; see `protocols.Source.sequences`."""
        self._split(split)
        if self._length == 0 or "labels" not in self._stored[0]:
            raise OptionError(
                "labels", f"{self.data} gives no labelled sequences. Store [n, T, d] and a tensor of labels."
            )
        labelled = self._labelled[split]  # [m], numbers of rows of the first axis
        if not len(labelled):
            raise OptionError("labels", f"no sequence of the split {split!r} has a label. Label more sequences.")
        numbers = np.arange(number * n, (number + 1) * n)
        if split == "held_out":
            chosen = labelled[numbers[numbers < len(labelled)]]
        else:
            chosen = labelled[self._passes.take(numbers, derived_seed("sequences", seed))]
        parts = [self._piece(*self._place(int(row))) for row in chosen] or [self._piece(0, 0, 0)]
        whole = {name: torch.cat([part[name] for part in parts]).to(self._device) for name in parts[0]}
        x = whole["x"].to(self._dtype)  # [n, T, d_in]
        mask = whole["mask"].bool() if "mask" in whole else torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        target = whole["target"].to(self._dtype) if "target" in whole else None  # [n, T, d_out]
        return SequenceBatch(x, mask, _columns(whole["labels"]), whole.get("tokens"), target)

    def identity(self) -> dict[str, Any]:
        """What determines the activations; see `protocols.Source.identity`. All files are read for their digests, once."""
        self._digests = self._digests or content_digests(self._files)
        return {
            "data": self.data,
            "data_digest": {path.name: digest for path, digest in zip(self._files, self._digests, strict=True)},
            "key": self.key,
            **{name: key for name, key in self._optional.items() if key is not None},
            "chunk": self.chunk,
            "held_out": self.held_out,
            "held_out_by": self.held_out_by,
        }

    def token_strings(self, tokens: Tensor) -> list[str]:
        """Each token id as a number in angle brackets, because the files do not hold its text."""
        return [f"<{token}>" for token in tokens.tolist()]

    # --- the files ---------------------------------------------------------------------------------------------

    @cached_property
    def _files(self) -> list[Path]:
        files = find_files(self.data, SUFFIXES)
        if files is None:
            raise OptionError("data", f"{self.data!r}: there is no such file or directory. Name one.")
        kinds = sorted({path.suffix for path in files})
        if len(kinds) > 1:
            raise OptionError(
                "data", f"{self.data!r} holds {' and '.join(kinds)} files. Name those of one kind, with a glob."
            )
        named = [name for name, key in self._optional.items() if key is not None]
        if kinds == [".npy"] and named:
            raise OptionError(named[0], "a .npy file holds one array and no other. Store both in .safetensors files.")
        return files

    def _columns(self, path: Path) -> dict[str, StoredTensor]:
        """The tensors of a file by their meaning. UsageError if one does not fit the activations."""
        x = stored_tensor(path, "" if path.suffix == ".npy" else self.key, "key")
        if len(x.shape) not in (2, 3) or not x.dtype.is_floating_point:
            raise UsageError(
                f"{x.name}: is {_described(x)}; activations are floating-point numbers [n, d], or [n, T, d] for sequences."
            )
        columns = {"x": x}
        for name, key in self._optional.items():
            if key is not None:
                columns[name] = stored_tensor(path, key, name)
        for name, tensor in columns.items():
            wanted, fits = _fits(name, tensor.shape, x.shape)
            if not fits:
                raise UsageError(
                    f"{tensor.name}: is {_described(tensor)}, and {name} of {_described(x)} must be {wanted}."
                )
        for name, of_numbers in (("target", True), ("tokens", False)):
            if name in columns and columns[name].dtype.is_floating_point != of_numbers:
                wanted = "floating-point numbers" if of_numbers else "whole numbers"
                raise UsageError(f"{columns[name].name}: is {_described(columns[name])}; {name} are {wanted}.")
        return columns

    @staticmethod
    def _agree(first: dict[str, StoredTensor], other: dict[str, StoredTensor]) -> None:
        for name, tensor in other.items():
            like = first[name]
            if tensor.shape[1:] != like.shape[1:] or tensor.dtype != like.dtype:
                raise UsageError(
                    f"{tensor.name}: is {_described(tensor)}, but {like.name} is {_described(like)}. Files may differ "
                    "only in their number of rows. Give those that belong together, with a glob."
                )

    def _held_out(self, chunks: Chunks) -> np.ndarray:
        """Which chunks are held out, [C] booleans: an even share of them, or of the files."""
        total, what = (len(chunks), "chunk") if self.held_out_by == "chunk" else (len(self._files), "file")
        if total < 2:
            fix = "Lower chunk." if what == "chunk" else 'Give more files, or set held_out_by = "chunk".'
            raise OptionError(
                "data", f"{self.data} is one {what}, which cannot be divided into training and held out. {fix}"
            )
        count = min(max(1, round(total * self.held_out)), total - 1)
        chosen = np.zeros(total, dtype=bool)
        chosen[((np.arange(count) + 0.5) * total / count).astype(np.int64)] = True
        return chosen if what == "chunk" else chosen[chunks.files]

    def _look_through_labels(self) -> None:
        """Refuse values that are not labels, name the columns, and note which sequences have a label."""
        width = 1 if len(self._stored[0]["labels"].shape) == 1 else self._stored[0]["labels"].shape[1]
        self.concepts = self.concepts or [f"label {i}" for i in range(width)]
        if len(self.concepts) != width:
            raise OptionError(
                "concepts", f"names {len(self.concepts)} columns, but {self._stored[0]['labels'].name} has {width}."
            )
        known, ones = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=np.int64)
        labelled = []
        for file, columns in enumerate(self._stored):
            stored = columns["labels"]
            for start in range(0, len(stored), _SCAN):
                labels = _columns(stored.rows(start, min(start + _SCAN, len(stored))))  # [n, concepts]
                there = ~labels.isnan()
                wrong = (there & (labels != 0) & (labels != 1)).any(1)
                if wrong.any():
                    row = int(wrong.nonzero()[0])
                    raise UsageError(
                        f"{stored.name}, row {start + row}: {labels[row].tolist()} is not a label. Store 0, 1, or NaN if "
                        "it is not known."
                    )
                known += there.sum(0).numpy()
                ones += (labels == 1).sum(0).numpy()
                if self._length:
                    labelled.append(there.any(1).nonzero()[:, 0].numpy() + start + self._offsets[file])
        for name, n, n_ones in zip(self.concepts, known, ones, strict=True):
            if n_ones in (0, n):
                self.warnings.append(
                    f"The label {name!r} of {self.data} is {int(n_ones > 0)} in each of the {n} rows that have it."
                )
        if labelled:
            rows = np.concatenate(labelled)
            self._labelled = {split: rows[self._belongs(chunks, rows)] for split, chunks in self._splits.items()}
            self._labelled["held_out"] = self._labelled["held_out"][held_out_order(len(self._labelled["held_out"]))]
            self._passes = Passes(len(self._labelled["train"]), "labelled sequences")

    def _belongs(self, chunks: Chunks, rows: np.ndarray) -> np.ndarray:
        """Which rows of the first axis lie in some of the chunks (which are in order): [n] booleans."""
        begins, ends = (self._offsets[chunks.files] + edge for edge in (chunks.starts, chunks.stops))
        last = np.searchsorted(begins, rows, side="right") - 1
        return (last >= 0) & (rows < ends[last])

    def _place(self, row: int) -> tuple[int, int, int]:
        """The file of a row of the first axis, and its place there, as `_piece` takes it."""
        file = int(np.searchsorted(self._offsets, row, side="right")) - 1
        start = row - int(self._offsets[file])
        return file, start, start + 1

    def _piece(self, file: int, start: int, stop: int) -> dict[str, Tensor]:
        return rows_of(self._stored[file], start, stop)

    def _rows(self, file: int, start: int, stop: int) -> Activations:
        """The activations of some rows of the first axis, one for each position that is not masked."""
        piece = self._piece(file, start, stop)
        n, length = stop - start, self._length or 1
        numbers = torch.arange(n) + int(self._offsets[file]) + start
        columns: dict[str, Tensor] = {
            "x": piece["x"].to(self._dtype).flatten(0, -2),  # [n * T, d_in]
            "sequence": numbers.repeat_interleave(length),
            "position": torch.arange(length).repeat(n),
        }
        if "target" in piece:
            columns["target"] = piece["target"].to(self._dtype).flatten(0, -2)
        if "tokens" in piece:
            columns["tokens"] = piece["tokens"].long().flatten()
        if "labels" in piece:
            columns["labels"] = _columns(piece["labels"]).repeat_interleave(length, 0)
        found = Activations(**columns)
        return found.rows(piece["mask"].bool().flatten()) if "mask" in piece else found

    def _split(self, split: str) -> Chunks:
        if split not in self._splits:
            raise UsageError(f"split {split!r}: there are only 'train' and 'held_out'.")
        return self._splits[split]


def _columns(labels: Tensor) -> Tensor:
    """Labels as batches have them: [n] or [n, concepts] of any type -> [n, concepts] float32."""
    return (labels if labels.ndim == 2 else labels[:, None]).float()


def _described(tensor: StoredTensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _fits(name: str, shape: tuple[int, ...], x: tuple[int, ...]) -> tuple[str, bool]:
    """What shape a column must have beside activations of shape `x`, in words, and whether it has it."""
    places = ", ".join(map(str, x[:-1]))
    if name in ("x", "target"):
        return f"[{places}, d]", len(shape) == len(x) and shape[:-1] == x[:-1]
    if name == "labels":
        return f"[{x[0]}] or [{x[0]}, concepts]", len(shape) in (1, 2) and shape[0] == x[0]
    if name == "mask" and len(x) == 2:
        return "left out: only sequences [n, T, d] are padded", False
    return f"[{places}]", shape == x[:-1]
