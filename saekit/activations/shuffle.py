"""Shuffled batches: the blocks of a source, permuted and cut into batches of one size, harvested ahead in the background."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from saekit.activations.batch import Activations
from saekit.activations.progress import tell_harvest
from saekit.seeds import derived_seed

if TYPE_CHECKING:
    from saekit.protocols import Source


class ShuffledBatches:
    """Batches of exactly `batch_size` activations of a source's split "train", in an order drawn from the seed.

    Block b of the source (of about `block_size` activations) is permuted by a generator seeded from sha256 of
    (seed, b); a batch may span two blocks. If the source ends, an incomplete last batch is dropped.

    `position` is (block, offset): the first activation that no batch has had yet. It changes with each batch that is handed
    over, whatever was harvested ahead; a new iterator that starts there gives the same batches from then on.

    `prefetch` blocks are harvested ahead by a background thread; with 0 each is harvested when it is needed, in the
    caller's thread. An exception of the source reaches the caller of `next` as it was raised. `close`, or leaving
    the `with` block, ends the thread: at once if the source calls `stop_point`, otherwise when its block is done.

    Memory: prefetch + 1 blocks and one batch; one more block if the source keeps the one that it has given.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        block_size: int,
        seed: int,
        prefetch: int = 0,
        position: tuple[int, int] = (0, 0),
    ):
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        self._block: Activations | None = None
        self._order = torch.empty(0, dtype=torch.long)
        blocks = source.blocks("train", size=block_size, seed=seed, start=position[0])
        self._ahead = _Ahead(blocks, prefetch) if prefetch else None
        self._blocks: Iterator[Activations] = self._ahead or blocks
        if self._ahead is not None:
            self._finalizer = weakref.finalize(self, self._ahead.close)

    def __iter__(self) -> ShuffledBatches:
        return self

    def __next__(self) -> Activations:
        """The next batch: tensors of [batch_size, ...]."""
        parts: list[Activations] = []
        number, offset = self.position
        missing = self.batch_size
        while missing:
            if self._block is None:
                self._block = next(self._blocks)
                self._order = self._permutation(number, self._block)
            rows = self._order[offset : offset + missing]
            if len(rows):
                parts.append(self._block.rows(rows))
            missing -= len(rows)
            offset += len(rows)
            if offset >= len(self._order):
                self._block = None  # before the next one is asked for, so that two are never held at once
                number, offset = number + 1, 0
        self.position = (number, offset)
        return Activations.join(parts)

    def close(self) -> None:
        """End the background thread and drop the blocks that are held."""
        self._block = None
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> ShuffledBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _permutation(self, number: int, block: Activations) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derived_seed("shuffle", self.seed, number))
        return torch.randperm(len(block), generator=generator).to(block.x.device)  # [n]


class Stopped(Exception):
    """Raised by `stop_point` in a background thread whose activations are no longer needed."""


class _Ahead(threading.Thread):
    """Takes blocks from an iterator ahead of their consumer; never more than `count` are ready or in progress."""

    def __init__(self, blocks: Iterator[Activations], count: int):
        super().__init__(name="saekit-harvest", daemon=True)
        self.stopping = threading.Event()
        self.progress: tuple[int, int] | None = None  # of the block that is being harvested
        self._source = blocks
        self._room = threading.Semaphore(count)
        self._ready: queue.SimpleQueue[Activations | BaseException] = queue.SimpleQueue()
        self._torch_threads = torch.get_num_threads()
        self.start()

    def run(self) -> None:
        """Harvest until stopped, until the source ends or until it fails."""
        torch.set_num_threads(self._torch_threads)  # per thread; another number may give other last bits
        while True:
            self._room.acquire()
            if self.stopping.is_set():
                return
            try:
                self._ready.put(next(self._source))
            except BaseException as error:  # StopIteration too: the consumer must see whatever ends the blocks
                self._ready.put(error)
                return

    def __next__(self) -> Activations:
        while True:
            try:
                got = self._ready.get(timeout=1.0)
                break
            except queue.Empty:
                if self.progress is not None:
                    tell_harvest(*self.progress)
        if isinstance(got, BaseException):
            self._ready.put(got)  # the same answer if it is asked again
            self.join()
            raise got
        self._room.release()
        return got

    def __iter__(self) -> _Ahead:
        return self

    def close(self) -> None:
        """Stop, wait until the thread is gone, and drop what it had ready."""
        self.stopping.set()
        self._room.release()
        if self.is_alive():
            self.join()
        while not self._ready.empty():
            self._ready.get()
        self._ready.put(RuntimeError("these batches were closed"))


def stop_point(done: int = 0, total: int = 0) -> None:
    """For a source, between two forwards: ends the harvest of a block if its background thread should stop.

    done, total: how many activations of the block are there, for those who wait for it; a total of 0 says nothing."""
    thread = threading.current_thread()
    if isinstance(thread, _Ahead):
        if thread.stopping.is_set():
            raise Stopped
        thread.progress = (done, total) if total else thread.progress
    elif total:
        tell_harvest(done, total)
