"""How the checks of several kinds compare values."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saekit.errors import PluginError
from saekit.sae.code import Code, DenseCode, SparseCode
from saekit.testing.kit import Failed
from saekit.training.state import plain_state


def copied(value: Any) -> Any:
    """A copy of the tensors and numbers in `value`: a step, a code, dictionaries, lists."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, SparseCode):
        parts = {"values": value.values, "indices": value.pattern.indices, "offsets": value.pattern.offsets}
        return copied(parts if value.gates is None else {**parts, "gates": value.gates})
    if isinstance(value, DenseCode):
        return copied({"activations": value.activations})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: copied(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "sae"}
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [copied(inner) for inner in value]
    return None if isinstance(value, Code) else value


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal to the bit; NaN equals NaN."""
    return not changed(copied(a), copied(b), "it")


def changed(before: Any, after: Any, name: str = "") -> str:
    """The name of the first thing in which two copies differ; empty if they are equal."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            inner = f"{name}.{key}" if name else str(key)
            if key not in before or key not in after:
                return inner
            found = changed(before[key], after[key], inner)
            if found:
                return found
        return ""
    if isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            return name
        return next((w for n, pair in enumerate(zip(before, after, strict=True)) if (w := changed(*pair, f"{name}[{n}]"))), "")
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        equal = before.shape == after.shape and before.dtype == after.dtype
        return "" if equal and torch.equal(before.nan_to_num(1.5e300), after.nan_to_num(1.5e300)) else name
    nan = isinstance(before, float) and isinstance(after, float) and before != before and after != after
    return "" if nan or (type(before) is type(after) and before == after) else name


def through_a_checkpoint(state: Any) -> dict[str, Any]:
    """A state_dict as a checkpoint gives it back; Failed if one cannot hold it."""
    if not isinstance(state, dict):
        raise Failed(f"state_dict() returns {type(state).__name__}. Return a dictionary of tensors and plain values.")
    back: dict[str, Any] = {}
    for key, value in state.items():
        try:
            back[key] = value.detach().clone() if isinstance(value, Tensor) else json.loads(json.dumps(plain_state(value, key)))
        except PluginError as error:
            raise Failed(str(error)) from None
    return back


def saved_and_loaded(holder: Any, other: Any) -> None:
    """Give `other` the state of `holder`, as resuming does."""
    state = through_a_checkpoint(holder.state_dict())
    before = copied(state)
    if state:
        other.load_state_dict(state)
    what = changed(before, copied(through_a_checkpoint(other.state_dict())))
    if what:
        raise Failed(f"load_state_dict does not restore {what!r}, which state_dict returned. Restore it there.")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's and numpy's generators in the block, and put them back afterwards.

    So only the checks of determinism find a component that draws from them."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
