"""The codes of the last steps of training, for callbacks that look at activations every now and then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saekit import Code, Pattern, SparseCode


class Window:
    """Codes, each kept as its entries that are not zero: (rows, latents, values) and the number of rows."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, code: Code) -> None:
        """Take in a code, without its gradient."""
        rows, latents, values = (t.detach().clone() for t in code.nonzero())
        self._kept.append((rows, latents, values, len(code)))

    def codes(self, d_sae: int) -> Iterator[Code]:
        """The codes in their order."""
        for rows, latents, values, batch in self._kept:
            yield SparseCode(Pattern.of_rows(rows, latents, batch, d_sae), values)

    def clear(self) -> None:
        """Keep nothing."""
        self._kept = []

    def to(self, device: torch.device) -> None:
        """Move what is kept, as after a checkpoint."""
        self._kept = [(rows.to(device), latents.to(device), values.to(device), n) for rows, latents, values, n in self._kept]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: `rows`, and three tensors for each code."""
        state: dict[str, Any] = {"rows": [kept[3] for kept in self._kept]}
        for i, kept in enumerate(self._kept):
            state |= {f"code{i}.{name}": tensor for name, tensor in zip(("rows", "latents", "values"), kept, strict=False)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; other keys are left alone."""
        self._kept = [
            (state[f"code{i}.rows"], state[f"code{i}.latents"], state[f"code{i}.values"], batch)
            for i, batch in enumerate(state["rows"])
        ]
