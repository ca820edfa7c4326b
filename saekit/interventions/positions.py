"""Positions: where in a text an attachment acts, even while the text grows token by token.

A position counts the tokens of its text from 0. Padding before the text does not shift it, and it means the same whether
the text goes through the model at once or, with a cache, one token at a time.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saekit.activations.trained_positions import TrainedPositions
from saekit.errors import UsageError

Positions = slice | int | Sequence[int] | Tensor | TrainedPositions | Callable[[Tensor], Tensor]


@dataclass
class Stretch:
    """The part of its texts that one forward sees.

    absolute: [n, T] positions, -1 for padding.
    lengths: [n, 1] tokens of each text so far.
    past: how many columns earlier forwards have seen.
    growing: whether more tokens may follow (the model keeps a cache).
    tokens: [n, T]; None if the model's arguments do not show them.
    """

    absolute: Tensor
    lengths: Tensor
    past: int
    growing: bool
    tokens: Tensor | None = None


@dataclass
class _Call:
    width: int  # T
    past: int
    mask: Tensor | None  # [n, past + T]
    growing: bool
    ids: Tensor | None = None  # [n, T]


class TextTracker:
    """Tracks which part of its texts each forward of a model sees.

    A Hugging Face model's arguments show it: `past_key_values` has what came before, `attention_mask` the padding.
    For any other model positions are counted: a forward of one position continues the text, a forward of several
    begins a new one. After `restart` the next forward begins a new text.
    """

    def __init__(self, model: nn.Module) -> None:
        roots = (model, getattr(model, "original_model", None))  # a bridge does not list its model as a submodule
        modules = {m: None for root in roots if isinstance(root, nn.Module) for m in root.modules()}
        signatures = {kind: inspect.signature(kind.forward) for kind in {type(module) for module in modules}}
        tells = {kind: s for kind, s in signatures.items() if {"input_ids", "past_key_values"} <= {*s.parameters}}
        self._tell = {module: tells[type(module)] for module in modules if type(module) in tells}
        self._call: _Call | None = None
        self._next = 0

    def restart(self) -> None:
        """The next forward begins a new text."""
        self._next = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, read the arguments of the model's forwards without changing them."""
        self._call, self._next = None, 0
        with ExitStack() as stack:
            for module in self._tell:
                stack.callback(module.register_forward_pre_hook(self._called, with_kwargs=True).remove)
            yield

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**kwargs, **self._tell[module].bind_partial(module, *args, **kwargs).arguments}
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        if tokens is None or not (cache is None or hasattr(cache, "get_seq_length")):
            self._call = None
            return
        width, past = tokens.shape[1], 0 if cache is None else int(cache.get_seq_length())
        covers = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == past + width
        growing = cache is not None or bool(given.get("use_cache"))
        self._call = _Call(width, past, mask if covers else None, growing, given.get("input_ids"))

    def stretch(self, rows: int, width: int, device: torch.device) -> Stretch:
        """The stretch of a forward with an activation of [rows, width, d]. Call it once for each forward."""
        call = self._call
        if call is None or call.width != width:
            past = self._next if width == 1 else 0
            call = _Call(width, past, None, growing=past > 0)
        self._next = call.past + width
        if call.mask is not None and call.mask.shape[0] == rows:
            real = call.mask.to(device, torch.bool)
            absolute = (real.cumsum(1) - 1).masked_fill(~real, -1)[:, call.past :]
            return Stretch(absolute, real.sum(1, keepdim=True), call.past, call.growing, call.ids)
        columns = torch.arange(call.past, call.past + width, device=device)
        lengths = torch.full((rows, 1), call.past + width, device=device)
        ids = call.ids if call.ids is not None and call.ids.shape[0] == rows else None
        return Stretch(columns.expand(rows, width), lengths, call.past, call.growing, ids)


def checked_positions(positions: Positions | None) -> Positions | None:
    """`positions` in the form that `chosen` takes; UsageError if they are not positions."""
    if positions is None or isinstance(positions, TrainedPositions) or callable(positions):
        return positions
    if isinstance(positions, slice):
        if positions.step is not None and positions.step < 1:
            raise UsageError(f"positions: the step of a slice must be 1 or more, not {positions.step}.")
        return positions
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.ndim != 2:
            raise UsageError(f"positions: a mask must be [n, T], not {list(positions.shape)}.")
        return positions
    if isinstance(positions, Tensor):
        positions = positions.tolist()
    try:
        return [operator.index(p) for p in (positions if isinstance(positions, Sequence) else [positions])]
    except TypeError:
        raise UsageError(
            f"positions: {positions!r} is neither a slice, a list of numbers, a boolean mask [n, T] nor a function."
        ) from None


def chosen(positions: Positions, stretch: Stretch) -> Tensor:
    """Which of a forward's positions are chosen: boolean [n, T]. Only a mask can choose padding."""
    at = stretch.absolute
    if isinstance(positions, TrainedPositions):
        return positions.among(at, stretch.tokens)
    if isinstance(positions, Tensor):
        return _from_mask(positions, stretch)
    if isinstance(positions, slice):
        start = _from_end(positions.start or 0, stretch).clamp_min(0)  # [n, 1]
        found = (at >= start) & ((at - start) % (positions.step or 1) == 0)
        if positions.stop is not None:
            found &= at < _from_end(positions.stop, stretch)
    elif callable(positions):
        found = torch.as_tensor(positions(at), device=at.device)
        if found.dtype != torch.bool or found.shape != at.shape:
            raise UsageError(
                f"positions: the function returned {found.dtype} {list(found.shape)} for positions {list(at.shape)}. "
                "Return booleans of the same shape."
            )
    else:
        found = torch.zeros_like(at, dtype=torch.bool)
        for position in positions:  # type: ignore[union-attr]
            found |= at == _from_end(position, stretch)
    return found & (at >= 0)


def _from_end(position: int, stretch: Stretch) -> Tensor:
    """A position as a count from the beginning of each text: [n, 1]."""
    if position >= 0:
        return torch.full_like(stretch.lengths, position)
    if stretch.growing or stretch.past:
        raise UsageError(
            f"positions: {position} counts from the end of the text, but the text is still growing (the model keeps a "
            "cache), so the end moves with every token. Count from the beginning, or call the model without a cache "
            "(use_cache=False)."
        )
    return stretch.lengths + position


def _from_mask(mask: Tensor, stretch: Stretch) -> Tensor:
    rows, width = stretch.absolute.shape
    fits = mask.shape[0] == rows and (stretch.past > 0 or mask.shape[1] == width)
    if not fits:
        raise UsageError(
            f"positions: the mask is {list(mask.shape)} and the forward sees {rows} rows of {width} positions. "
            "Give a mask of that shape, or use a slice or a function."
        )
    known = mask[:, stretch.past : stretch.past + width].to(stretch.absolute.device)
    beyond = known.new_zeros(rows, width - known.shape[1])  # tokens generated after the masked text are not chosen
    return torch.cat([known, beyond], dim=1)
