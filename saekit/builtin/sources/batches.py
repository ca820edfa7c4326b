"""What a batch of the user's holds, whatever its type: its items, its tensors, its arguments for the module."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saekit.builtin.sources.users_code import called, named_object
from saekit.errors import OptionError

Part = int | str
"""An item of a batch, by its place or key, or a function of the batch, by its name."""


def arguments(batch: Any, chosen: Sequence[Part] | None, data: str) -> tuple[list[Any], dict[str, Any]]:
    """A batch as the module's arguments. chosen: some of its items. data: what the batches' function is called, for messages.

    A tuple or a list is several arguments, but a list of texts is one."""
    if chosen is None:
        if isinstance(batch, Mapping):
            return [], {str(key): value for key, value in batch.items()}
        several = isinstance(batch, tuple | list) and not hasattr(batch, "_fields") and not is_texts(batch)
        return (list(batch), {}) if several else ([batch], {})
    found = {key: item(batch, key, "args", data) for key in chosen}
    if isinstance(batch, Mapping):
        return [], {str(key): value for key, value in found.items()}
    return list(found.values()), {}


def part_of(batch: Any, what: Any, option: str, data: str) -> Any:
    """What `labels`, `mask` or `caption` names: an item of the batch, or what a function gives for the batch."""
    if callable(what) or (isinstance(what, str) and ":" in what):
        return called(named_object(what, option), option, what, batch)
    return item(batch, what, option, data)


def item(batch: Any, key: Part, option: str, data: str) -> Any:
    """An item of a tuple, list or dictionary, or a field of a dataclass. OptionError if the batch has none of that name."""
    if not isinstance(batch, Mapping | tuple | list) and not dataclasses.is_dataclass(batch):
        raise OptionError(option, f"a batch of {data} is {described(batch)} and has no items. Leave {option} out.")
    try:
        return getattr(batch, str(key)) if dataclasses.is_dataclass(batch) else batch[key]  # type: ignore[index]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise OptionError(option, f"a batch of {data} has no item {key!r}; it is {described(batch)}.") from None


def is_texts(value: Any) -> bool:
    """Whether it is a list of texts, one for each row."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, str) for one in value)


def moved(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device; everything else in it is passed on as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(inner, device) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        inside = [moved(inner, device) for inner in value]
        return inside if isinstance(value, list) else type(value)(*inside) if hasattr(value, "_fields") else tuple(inside)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: moved(inner, device) for name, inner in _fields(value).items()})
    return value


def equal(a: Any, b: Any) -> bool:
    """Whether two batches hold the same tensors, texts and numbers in the same order."""
    pairs = (list(_leaves(a)), list(_leaves(b)))
    return len(pairs[0]) == len(pairs[1]) and all(map(_same, *pairs))


def digest(value: Any) -> str:
    """sha256 of the tensors, texts and numbers in a batch, in their order."""
    found = hashlib.sha256()
    for leaf in _leaves(value):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {list(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def described(value: Any) -> str:
    """A batch, for messages: `list [0] float32 [8, 3], [1] int64 [8]`."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    items: Any = None
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = _fields(value).items()
    if items is None:
        return type(value).__name__
    shown = [f"[{key}] {described(one) if isinstance(one, Tensor) else type(one).__name__}" for key, one in items]
    return f"{type(value).__name__} {', '.join(shown[:8])}{', ...' if len(shown) > 8 else ''}"


def _leaves(value: Any) -> Any:
    """The tensors, texts and numbers in a batch, in order."""
    if isinstance(value, Tensor | str | bool | int | float):
        yield value
        return
    if isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, tuple | list):
        inside = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = list(_fields(value).values())
    else:
        inside = []
    for one in inside:
        yield from _leaves(one)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def rows_of(value: Any, n: int, option: str, data: str, what: str = "rows") -> list[Any]:
    """A value for each row of a batch, as a list. OptionError if there are more or fewer."""
    found = list(value) if isinstance(value, Tensor | list | tuple) else None
    if found is None:
        raise OptionError(option, f"{data} gives {type(value).__name__}; give a list or a tensor, one for each of the {n} rows.")
    if len(found) != n:
        raise OptionError(
            option, f"{data} gives {len(found)} for a batch of {n} {what}. Give one for each row, None where there is none."
        )
    return found


