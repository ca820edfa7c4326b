"""From a batch's activations to rows: masks, pooling over positions, labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saekit.activations.batch import Activations
from saekit.builtin.sources.batches import described
from saekit.errors import OptionError, near_names

Pool = Literal["none", "mean", "max", "first", "last"]


@dataclass
class BatchRows:
    """What one batch gives: n sequences of T positions; T is 1 if there are no positions, or if they were pooled.

    x: [n, T, d_in]. target: [n, T, d_out] or None. mask: [n, T], the positions that count. labels: [n, T, n_concepts] or None.
    """

    x: Tensor
    target: Tensor | None
    mask: Tensor
    labels: Tensor | None

    def activations(self, first: int) -> Activations:
        """One row for each position that counts. first: the number of the first sequence."""
        row, position = self.mask.nonzero(as_tuple=True)  # [m], [m]
        labels, target = self.labels, self.target
        return Activations(
            self.x[row, position],
            None if target is None else target[row, position],
            sequence=first + row,
            position=position,
            labels=None if labels is None else labels[row, position],
        )

    @property
    def sequence_labels(self) -> Tensor:
        """[n, n_concepts], 1 if a position has it, 0 if none of those with a label has, NaN if no position has a label."""
        assert self.labels is not None
        known = self.labels.masked_fill(~self.mask[:, :, None], torch.nan)
        largest = known.nan_to_num(-1.0).amax(1)
        return torch.where(largest < 0, torch.nan, largest)


def pooled(x: Tensor, mask: Tensor, pool: Pool) -> Tensor:
    """One vector for each sequence, of the positions that count: [n, T, d], [n, T] -> [n, 1, d].

    What stands at the other positions does not matter, NaN included. Every row of the mask has a position."""
    there = mask[:, :, None]
    if pool == "mean":
        return x.masked_fill(~there, 0.0).sum(1, keepdim=True) / there.sum(1, keepdim=True)
    if pool == "max":
        return x.masked_fill(~there, -torch.inf).amax(1, keepdim=True)
    return x[torch.arange(len(x), device=x.device), one_position(mask, pool)][:, None]


def spread(change: Tensor, mask: Tensor, pool: Pool) -> Tensor:
    """What to add at each position so that the rows which `mask` and `pool` make change by `change`: [m, d] -> [n, T, d].

    A mean changes by as much as each of its positions; every other row is one position. There is no such answer for `max`."""
    if pool == "mean":
        return change[:, None] * mask[:, :, None]
    added = change.new_zeros(*mask.shape, change.shape[1])
    if pool == "none":
        added[mask] = change
    else:
        added[torch.arange(len(mask), device=mask.device), one_position(mask, pool)] = change
    return added


def one_position(mask: Tensor, pool: Pool) -> Tensor:
    """The first or the last position that counts in each sequence: [n, T] -> [n]."""
    return mask.int().argmax(1) if pool == "first" else mask.shape[1] - 1 - mask.int().flip(1).argmax(1)


def mask_of(value: Any, x: Tensor, where: str) -> Tensor:
    """A mask as [n, T] booleans. x: the activation, [n, d] or [n, T, d]. where: the batch, for messages."""
    if x.ndim == 2:
        raise OptionError("mask", f"the activation at the hook point is {described(x)} and has no positions. Leave mask out.")
    mask = torch.as_tensor(value, device=x.device)
    if mask.shape != x.shape[:2]:
        raise OptionError(
            "mask", f"it is {described(mask)} and the activation {described(x)} in {where}; give {list(x.shape[:2])}, 0 at padding."
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise OptionError("mask", f"it holds other numbers than 0 and 1 in {where}. Give 1 where a position counts, 0 at padding.")
    mask = mask.bool()
    empty = ~mask.any(1)
    if bool(empty.any()):
        row = int(empty.nonzero()[0])
        raise OptionError(
            "mask", f"row {row} of {where} is all padding, so there is nothing of it. Leave such rows out of the batches."
        )
    return mask


def labels_of(value: Any, concepts: Sequence[str], n: int, length: int, where: str) -> Tensor:
    """Labels of a batch as [n, n_concepts], or [n, T, n_concepts] if there is one for each position: 0, 1, or NaN if unknown.

    value: [n] or [n, n_concepts], a tensor or lists with None for NaN; [n, T] for one concept by position, [n, T, n_concepts] for
        several. With several concepts, [n] holds the number or the name of each row's class (negative or None: unknown).
    """
    found = _as_tensor(value, concepts)
    if found.ndim == 0 or len(found) != n:
        raise OptionError("labels", f"they are {described(found)} for the {n} rows of {where}. Give one for each row.")
    if found.ndim == 1 and len(concepts) > 1:
        found = _of_classes(found, len(concepts), where)
    elif found.ndim == 1:
        found = found[:, None]
    elif found.ndim == 2 and len(concepts) == 1 and found.shape[1] == length > 1:
        found = found[:, :, None]
    if found.shape[-1] != len(concepts) or found.ndim > 3 or (found.ndim == 3 and found.shape[1] != length):
        raise OptionError(
            "labels",
            f"they are {described(found)} in {where}, which has {n} rows of {length} positions and {len(concepts)} concepts. Give "
            "[n, concepts], or [n, positions, concepts], and name the columns in concepts.",
        )
    wrong = ~((found == 0) | (found == 1) | found.isnan())
    if bool(wrong.any()):
        raise OptionError(
            "labels",
            f"{float(found[wrong][0]):g} in {where} is no label. Give 0, 1, or NaN if it is not known; of classes give [n] "
            "numbers, and the names of all classes in concepts.",
        )
    return found


def columns_of(value: Any) -> int:
    """How many concepts labels have for which no names were given."""
    found = _as_tensor(value, ())
    return 1 if found.ndim < 2 else found.shape[-1]


def _as_tensor(value: Any, concepts: Sequence[str]) -> Tensor:
    if isinstance(value, list | tuple):
        value = [_number(one, concepts) for one in value]
    try:
        return torch.as_tensor(value).float()
    except (TypeError, ValueError, RuntimeError):
        raise OptionError("labels", f"{type(value).__name__} holds no labels. Give a tensor or a list of numbers.") from None


def _number(label: Any, concepts: Sequence[str]) -> Any:
    if label is None:
        return float("nan")
    if isinstance(label, list | tuple):
        return [_number(one, concepts) for one in label]
    if not isinstance(label, str):
        return label
    if label not in concepts or len(concepts) < 2:
        raise OptionError("concepts", f"there is no class {label!r}.{near_names(label, concepts)} Name all classes in concepts.")
    return list(concepts).index(label)


def _of_classes(numbers: Tensor, count: int, where: str) -> Tensor:
    """[n] numbers of classes -> [n, count], NaN for those below 0 and those that are NaN."""
    known = numbers >= 0
    wrong = known & ((numbers >= count) | (numbers != numbers.round()))
    if bool(wrong.any()):
        raise OptionError(
            "labels",
            f"{float(numbers[wrong][0]):g} in {where} is not the number of a class; concepts names {count}, 0 to {count - 1}.",
        )
    of_class = torch.nn.functional.one_hot(numbers.nan_to_num(0).clamp_min(0).long(), count).float()
    return torch.where(known[:, None], of_class, torch.nan)
