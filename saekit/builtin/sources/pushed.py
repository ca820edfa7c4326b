"""The source `pushed`: a circular buffer that a program fills while it runs, for `saekit.Online`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from saekit.activations.batch import Activations
from saekit.errors import OptionError, UsageError
from saekit.out_of_memory import is_out_of_memory
from saekit.seeds import derived_seed

_FILL = 16_384  # as many as decide the scale and the first bias of a run


class PushedSource:
    """Activations that a program pushes while it runs: the newest `rows` of them, in a circular buffer.

    Training draws from what is in the buffer: every place once in each pass over it, in an order drawn from (seed, pass), and
    what is read is what the place holds when its turn comes. Some pushes, or those that the program says, go whole into a
    smaller buffer that is held out for the metrics: its newest rows, so that the metrics are of the model as it is at the end.

    Memory: `(rows + rows * held_out) * d_in * 4` bytes, from the beginning. What is drawn cannot be told from the options, so
    a run with this source is not repeated by its run file alone.
    """

    subject = None

    def __init__(
        self,
        *,
        d_in: Annotated[int, Field(gt=0, description="The width of what is pushed.")],
        rows: Annotated[int, Field(gt=0, description="The most activations that are held for training.")] = 819_200,
        every: Annotated[int, Field(gt=0, description="Steps of the program for one step of the SAE.")] = 1,
        fill: Annotated[
            int | None, Field(gt=0, description="Activations before the first step; 16,384 by default, or `rows`.")
        ] = None,
        held_out: Annotated[float, Field(gt=0, le=0.5, description="The share of pushes that is held out.")] = 0.05,
        place: Annotated[Literal["device", "host"], Field(description="Hold them on the SAE's device or the host.")] = "device",
        keep: Annotated[bool, Field(description="Keep the buffer in checkpoints.")] = False,
        model: Annotated[str | None, Field(description="What to call the program's model.")] = None,
        hook_point: Annotated[str | None, Field(description="Where in the program's model they are read.")] = None,
    ) -> None:
        if fill is not None and fill > rows:
            raise OptionError("fill", f"{fill} activations never are in a buffer of {rows} rows. Lower fill, or raise rows.")
        self.d_in = self.d_out = d_in
        self.rows, self.every, self.fill = rows, every, fill or min(rows, _FILL)
        self.held_out, self.place, self.keep = held_out, place, keep
        self.model, self.hook_point = model, hook_point
        self._pushes = self._steps = 0
        self._pass = (-1, 0)  # the pass over the buffer that was begun last, and how many rows it is of

    @property
    def held_out_rows(self) -> int:
        """The most activations that are held out."""
        return max(1, round(self.rows * self.held_out))

    @property
    def bytes(self) -> int:
        """What the buffers take in memory."""
        return (self.rows + self.held_out_rows) * self.d_in * torch.float32.itemsize

    def peek(self) -> dict[str, Any]:
        """The width, and what the buffers take; see `protocols.Source.peek`."""
        known = {"model": self.model, "hook_point": self.hook_point}
        return {
            **{name: value for name, value in known.items() if value is not None},
            "d_in": self.d_in,
            "d_out": self.d_out,
            "data": f"pushed by a program; a buffer of {self.rows:,} rows, and {self.held_out_rows:,} held out, takes "
            f"{self.bytes / 1e6:,.1f} MB on the {self.place}",
        }

    def open(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Take the buffers' memory."""
        where = torch.device("cpu") if self.place == "host" else torch.device(device)
        try:
            self._train, self._held_out = (
                _Ring(torch.empty(n, self.d_in, dtype=dtype, device=where)) for n in (self.rows, self.held_out_rows)
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fix = "Lower rows" + (', or set place = "host".' if where.type != "cpu" else ".")
            raise OptionError("rows", f"a buffer of {self.bytes / 1e9:.2f} GB does not fit on {where}. {fix}") from error

    @property
    def held(self) -> int:
        """How many activations are held for training now."""
        return self._train.filled

    def push(self, x: Tensor, held_out: bool | None = None) -> None:
        """Take in activations [n, d_in]; the oldest make room for them. See `protocols.PushedSource`."""
        if held_out is None:
            held_out = self._pushes % max(2, round(1.0 / self.held_out)) == 1
            self._pushes += 1
        (self._held_out if held_out else self._train).push(x)

    def due(self) -> bool:
        """Count a step of the program; True if the SAE is to have one now."""
        self._steps += 1
        return self._steps % self.every == 0 and self.held >= self.fill

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """See `protocols.PushedSource`. "train": the whole buffer if `size` is `rows` or more, as a view; otherwise that many of
        its rows, drawn at random. "held_out": every row once, in an order that no seed changes."""
        if split not in ("train", "held_out"):
            raise UsageError(f"split {split!r}: there are only 'train' and 'held_out'.")
        if split == "held_out":
            held_out = self._held_out.now
            order = _order(len(held_out), derived_seed("held out"))
            yield from (Activations(held_out[_on(rows, held_out)]) for rows in order.split(size)[start:] if len(rows))
            return
        number = start
        while self.held:
            now = self._train.now
            if size >= self.rows:
                yield Activations(now[: self._rows_of_pass(number)])
            else:
                yield Activations(now[_on(_order(len(now), derived_seed("pushed", seed, number))[:size], now)])
            del now
            number += 1

    def identity(self) -> dict[str, Any]:
        """What is known of the activations: what the program calls them, and their width. Not what was pushed."""
        return {"model": self.model, "hook_point": self.hook_point, "d_in": self.d_in, "pushed": True}

    def state_dict(self) -> dict[str, Any]:
        """How many pushes and steps there were; with `keep` also what is held."""
        state: dict[str, Any] = {"pushes": self._pushes, "steps": self._steps}
        if self.keep:
            state |= {"train": self._train.now, "train_next": self._train.next, "pass": list(self._pass)}
            state |= {"held_out": self._held_out.now, "held_out_next": self._held_out.next}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that back. Without `keep` the buffers begin anew."""
        self._pushes, self._steps = state["pushes"], state["steps"]
        if self.keep:
            self._pass = (state["pass"][0], state["pass"][1])
            self._train.restore(state["train"], state["train_next"])
            self._held_out.restore(state["held_out"], state["held_out_next"])

    def _rows_of_pass(self, number: int) -> int:
        """How many rows pass `number` over the buffer is of: as many as there were when it began."""
        if number > self._pass[0]:
            self._pass = (number, self.held)
        return min(self._pass[1], self.held) if number == self._pass[0] else self.held


class _Ring:
    """The newest rows that were pushed. storage: [rows, d]. filled: how many there are. next: the place of the next one."""

    def __init__(self, storage: Tensor) -> None:
        self.storage, self.filled, self.next = storage, 0, 0

    @property
    def now(self) -> Tensor:
        """What is held, by place: [filled, d], a view."""
        return self.storage[: self.filled]

    @torch.no_grad()
    def push(self, x: Tensor) -> None:
        """Put x, [n, d], in the places after those that were filled last."""
        rows = len(self.storage)
        x = x[-rows:]
        first = min(len(x), rows - self.next)
        self.storage[self.next : self.next + first].copy_(x[:first])
        self.storage[: len(x) - first].copy_(x[first:])
        self.filled = min(rows, max(self.filled, self.next + len(x)))
        self.next = (self.next + len(x)) % rows

    def restore(self, rows: Tensor, following: int) -> None:
        """Hold these rows, by place, and go on at place `following`."""
        self.storage[: len(rows)].copy_(rows)
        self.filled, self.next = len(rows), following


def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))  # [n]


def _on(rows: Tensor, held: Tensor) -> Tensor:
    """Indices where what they index is: without a wait for the device."""
    return rows.to(held.device, non_blocking=True)
