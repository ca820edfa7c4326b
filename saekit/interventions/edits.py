"""Edits: what is done to a latent's activation, in which unit, and how several edits are applied at once."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saekit.errors import UsageError
from saekit.numerics import own_numerics
from saekit.sae.base import SparseAutoencoder
from saekit.sae.code import Code, DenseCode, SparseCode
from saekit.sae.kernels import Pattern

Unit = Literal["absolute", "max", "rms"]
Statistics = Mapping[str, "Tensor | Mapping[int, float]"]
UNITS = ("absolute", "max", "rms")


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of one latent's activation after gating: `clamp(factor * activation + shift, low, high)`.

    Made by `add`, `set_to`, `scale`, `ablate` and `clamp`. `shift`, `low` and `high` are in units of `unit`. A tensor
    for `factor` or `shift` is broadcast over the forward's rows and positions, [n, T], and receives gradients.
    """

    name: str
    factor: float | Tensor = 1.0
    shift: float | Tensor = 0.0
    low: float = -math.inf
    high: float = math.inf
    unit: Unit = "absolute"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UsageError(f"{self.name}: unit must be one of {', '.join(map(repr, UNITS))}, not {self.unit!r}.")
        if self.low > self.high:
            raise UsageError(f"{self.name}: low is {self.low:g} and high is {self.high:g}. Swap them.")

    def __repr__(self) -> str:
        return self.name


def add(strength: float | Tensor, *, unit: Unit = "absolute") -> Edit:
    """Add to the latent's activation at every position, even where it is off: steering along its decoder row.

    A negative strength steers away from the decoder row and may make the activation negative.
    """
    strength = _number(strength, "add", "strength")
    return Edit(_called("add", unit, strength), shift=strength, unit=unit)


def set_to(value: float | Tensor, *, unit: Unit = "absolute") -> Edit:
    """Set the latent's activation. A tensor [n, T] sets a value for each position."""
    value = _number(value, "set_to", "value")
    return Edit(_called("set_to", unit, value), factor=0.0, shift=value, unit=unit)


def scale(factor: float | Tensor) -> Edit:
    """Multiply the latent's activation; a latent that is off stays off."""
    factor = _number(factor, "scale", "factor")
    return Edit(_called("scale", "absolute", factor), factor=factor)


def ablate() -> Edit:
    """Set the latent's activation to zero."""
    return Edit("ablate()", factor=0.0)


def clamp(low: float | None = None, high: float | None = None, *, unit: Unit = "absolute") -> Edit:
    """Keep the latent's activation between `low` and `high`; None means no bound.

    A `low` above zero switches the latent on wherever it is off.
    """
    if low is None and high is None:
        raise UsageError("clamp(): give low, high or both.")
    bounds = [side if value is None else _bound(value) for value, side in ((low, -math.inf), (high, math.inf))]
    return Edit(_called("clamp", unit, *bounds), low=bounds[0], high=bounds[1], unit=unit)


def latent_statistics(sae: SparseAutoencoder, activations: Tensor | Iterable[Tensor]) -> dict[str, Tensor]:
    """`max` and `rms` of every latent, [d_sae] each, over activations [n, d_in] (one tensor, or batches of them).

    max: its largest activation. rms: the root mean square of its activations that are not zero. Both are 0 for a
    latent that never fires. Give them to `attach` as `statistics` for strengths in these units.
    """
    largest, squares, fired = (sae.W_dec.new_zeros(sae.d_sae, dtype=torch.float64) for _ in range(3))
    with torch.no_grad(), own_numerics(sae, sae.W_dec.device):
        for batch in [activations] if isinstance(activations, Tensor) else activations:
            _, latents, values = sae.encode(batch.to(sae.W_dec)).nonzero()
            values = values.double()
            largest.scatter_reduce_(0, latents, values, "amax")
            squares.index_add_(0, latents, values.square())
            fired.index_add_(0, latents, torch.ones_like(values))
    return {"max": largest, "rms": (squares / fired.clamp_min(1)).sqrt()}


class EditTable:
    """The edits of one attachment, checked against its SAE and applied together.

    latents: [e], the edited latents.
    """

    def __init__(
        self,
        edits: Mapping[int, Edit | Callable[[Tensor], Tensor]],
        d_sae: int,
        statistics: Statistics | None = None,
    ) -> None:
        numbers = [_latent(key, d_sae) for key in edits]
        self.latents = torch.tensor(numbers, dtype=torch.long)
        self._functions: dict[int, Callable[[Tensor], Tensor]] = {}
        self._edits: list[Edit] = []
        for column, (latent, edit) in enumerate(zip(numbers, edits.values(), strict=True)):
            if isinstance(edit, Edit):
                self._edits.append(_in_absolute_units(edit, latent, d_sae, statistics))
            elif callable(edit):
                self._functions[column] = edit
                self._edits.append(Edit("a function"))
            else:
                raise UsageError(
                    f"edit of latent {latent}: {edit!r} is not an edit. Give saekit.add(...), set_to, scale, ablate or "
                    "clamp, or a function of the activations."
                )

    def __len__(self) -> int:
        return len(self._edits)

    @property
    def only_adds(self) -> bool:
        """Whether every edit only adds a strength, so that the old activations are not needed."""
        free = (-math.inf, math.inf)
        added = (not isinstance(e.factor, Tensor) and e.factor == 1.0 and (e.low, e.high) == free for e in self._edits)
        return not self._functions and all(added)

    def strengths(self, like: Tensor, at_rows: Callable[[Tensor], Tensor]) -> Tensor:
        """What is added to each edited latent: [e], or [m, e] for each of the m rows of `like`."""
        return self._column([edit.shift for edit in self._edits], like, at_rows)

    def __call__(self, old: Tensor, at_rows: Callable[[Tensor], Tensor]) -> Tensor:
        """The new activations [m, e] of the edited latents, from the old ones.

        at_rows: turns a tensor that broadcasts over [n, T] into its values at the m rows.
        """
        factor = self._column([edit.factor for edit in self._edits], old, at_rows)
        shift = self.strengths(old, at_rows)
        low, high = (old.new_tensor([getattr(edit, side) for edit in self._edits]) for side in ("low", "high"))
        new = torch.clamp(old * factor + shift, min=low, max=high)  # [m, e]
        for column, function in self._functions.items():
            values = function(old[:, column])  # [m]
            if not isinstance(values, Tensor) or values.shape != old.shape[:1]:
                got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise UsageError(
                    f"edit of latent {int(self.latents[column])}: the function returned {got} for activations of shape "
                    f"{list(old.shape[:1])}. Return a tensor of the same shape."
                )
            new = new.index_copy(1, torch.tensor([column], device=new.device), values.to(new.dtype)[:, None])
        return new

    @staticmethod
    def _column(values: list[float | Tensor], like: Tensor, at_rows: Callable[[Tensor], Tensor]) -> Tensor:
        """A number for each edited latent, [e], or, if any is a tensor, for each row as well, [m, e]."""
        if not any(isinstance(value, Tensor) for value in values):
            return like.new_tensor(values)
        return torch.stack(
            [at_rows(v).to(like) if isinstance(v, Tensor) else like.new_full(like.shape[:1], v) for v in values], dim=1
        )


def change_of(
    sae: SparseAutoencoder, code: Code, edits: EditTable, at_rows: Callable[[Tensor], Tensor] = lambda value: value
) -> Tensor:
    """By how much edits change the reconstruction, decode(edited code) - decode(code): [m, d_in]."""
    latents = edits.latents.to(sae.W_dec.device)
    old = code.columns(latents)  # [m, e]
    new = edits(old, at_rows)
    if type(sae).decode is SparseAutoencoder.decode:
        return (new - old) @ sae.W_dec[latents]
    return sae.decode(replaced_columns(code, latents, new)) - sae.decode(code)


def replaced_columns(code: Code, latents: Tensor, values: Tensor) -> Code:
    """The code with `values` [batch, e] as the activations of `latents` [e]; the others do not change."""
    if isinstance(code, SparseCode):
        pattern = code.pattern
        edited = torch.zeros(code.d_sae, dtype=torch.bool, device=latents.device).index_fill_(0, latents, True)
        kept = ~edited[pattern.indices]
        numbers = torch.arange(len(code), device=latents.device)
        rows = torch.cat([pattern.rows[kept], numbers.repeat_interleave(len(latents))])
        order = rows.argsort(stable=True)
        indices = torch.cat([pattern.indices[kept], latents.repeat(len(code))])
        entries = torch.cat([code.values[kept], values.reshape(-1)])
        return SparseCode(Pattern.of_rows(rows[order], indices[order], len(code), code.d_sae), entries[order])
    return DenseCode(code.dense().index_copy(1, latents, values))


def _latent(key: Any, d_sae: int) -> int:
    try:
        latent = operator.index(key)
    except TypeError:
        raise UsageError(f"edits: {key!r} is not a latent. A latent is a number from 0 to {d_sae - 1}.") from None
    if not 0 <= latent < d_sae:
        raise UsageError(f"edits: there is no latent {latent}; the SAE has {d_sae}, 0 to {d_sae - 1}.")
    return latent


def _in_absolute_units(edit: Edit, latent: int, d_sae: int, statistics: Statistics | None) -> Edit:
    """The edit in absolute units. UsageError if the latent's statistic is missing or not positive."""
    if edit.unit == "absolute":
        return edit
    where = f"edit of latent {latent}: {edit} is in units of the latent's {edit.unit}"
    try:
        values: Any = (statistics or {})[edit.unit]
        if isinstance(values, Tensor) and values.shape != (d_sae,):
            raise UsageError(
                f"{where}, and statistics[{edit.unit!r}] has shape {list(values.shape)}. It must be [{d_sae}]."
            )
        size = float(values[latent])
    except (KeyError, IndexError):
        raise UsageError(
            f"{where}, which statistics does not have. Give attach(..., statistics={{{edit.unit!r}: a tensor [d_sae]}}); "
            "saekit.latent_statistics measures it."
        ) from None
    if not (math.isfinite(size) and size > 0):
        raise UsageError(
            f"{where}, which is {size:g}. A latent that never fires has no such unit: use unit='absolute'."
        )
    return Edit(edit.name, edit.factor, edit.shift * size, edit.low * size, edit.high * size)


def _number(value: Any, function: str, what: str) -> float | Tensor:
    """A finite number, or a tensor of them."""
    if isinstance(value, Tensor):
        if not bool(torch.isfinite(value).all()):
            raise UsageError(f"{function}: {what} contains numbers that are not finite.")
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{function}: {what} must be a number or a tensor, not {value!r}.") from None
    if not math.isfinite(number):
        raise UsageError(f"{function}: {what} must be finite, not {number}.")
    return number


def _bound(value: Any) -> float:
    number = _number(value, "clamp", "a bound")
    if isinstance(number, Tensor):
        raise UsageError("clamp: a bound must be a number.")
    return number


def _called(function: str, unit: str, *values: float | Tensor) -> str:
    """The call as it would be written: `add(15, unit='max')`."""
    shown = [f"tensor {list(v.shape)}" if isinstance(v, Tensor) else f"{v:g}" for v in values]
    return f"{function}({', '.join(shown)}{'' if unit == 'absolute' else f', unit={unit!r}'})"
