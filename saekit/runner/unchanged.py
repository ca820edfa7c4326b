"""`Unchanged`: notices a metric or an analyzer that changes the SAE it was given, which would falsify what is measured after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saekit.sae.base import SparseAutoencoder


class Unchanged:
    """An SAE as it is now, to be compared with what it is later."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self._sae, self._options = sae, sae.options()
        self._marks, self._sums = _marks(sae), _sums(sae)

    def is_untouched(self) -> bool:
        """Whether no tensor was replaced or written to by torch's operations. Takes microseconds; what is written through
        `.data` escapes it."""
        return _marks(self._sae) == self._marks

    def changes(self) -> list[str]:
        """The names of the tensors and options whose values differ; reads every tensor once."""
        now = _sums(self._sae)
        differ = [name for name in {**self._sums, **now} if not _equal(self._sums.get(name), now.get(name))]
        return [*differ, *(key for key, value in self._sae.options().items() if value != self._options.get(key))]


def _tensors(sae: SparseAutoencoder) -> dict[str, Tensor]:
    return dict(sae.named_parameters()) | dict(sae.named_buffers())


def _marks(sae: SparseAutoencoder) -> list[Any]:
    """What changes with a tensor: which object it is, where its numbers lie, and torch's count of writes."""
    return [(name, id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for name, t in _tensors(sae).items()]


def _sums(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """For each tensor the sum of each row's bits, read as whole numbers: several times faster than a hash."""
    return {name: _row_sums(tensor.detach()) for name, tensor in _tensors(sae).items()}


def _row_sums(tensor: Tensor) -> Tensor:
    rows = tensor.reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1).contiguous()  # [n, m]
    width = rows.shape[1] * rows.element_size()
    whole = next(dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8) if width % dtype.itemsize == 0)
    return rows.view(whole).sum(1, dtype=torch.int64).cpu()  # [n]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
