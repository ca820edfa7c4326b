"""`Rerun`: batches through a whole module of the user's, and again with other activations at the hook point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saekit.activations.batch import RunBatch
from saekit.activations.sites import resolve
from saekit.builtin.sources.batches import described
from saekit.builtin.sources.forward import Forward
from saekit.builtin.sources.pooling import Pool, spread
from saekit.errors import OptionError, UsageError


class Rerun:
    """Runs a module with its outputs.

    output: the hook point at which they are read; "." is what the module returns. names: what they are called, None to number
    them. If a module is called several times in a forward, its first call counts, as everywhere.
    """

    def __init__(self, forward: Forward, pool: Pool, output: str, names: Sequence[str] | None) -> None:
        self._forward, self._pool, self._names = forward, pool, names
        try:
            self._site = resolve(forward.network, output)
        except UsageError as error:
            raise OptionError("output", str(error)) from None
        if names is not None and len(set(names)) < len(names):
            raise OptionError("output_names", "two outputs have the same name. Give each another one.")

    def batch(self, batch: Any, number: int, *, first: int) -> RunBatch:
        """Batch `number`. first: the number of its first sequence."""
        where = self._forward.where(number)
        found: list[Tensor] = []

        def seen(activation: Tensor) -> Tensor:
            found.append(activation.clone())  # what follows may change it in place
            return activation

        outputs = self._run(batch, seen)
        rows = self._forward.rows_of(batch, number, [found[0]])
        mask = self._forward.mask(batch, found[0], where)  # before pooling: [n, T]
        there = mask if outputs.ndim == 3 else None  # which positions of the outputs count
        self._check(outputs, mask, where)
        labels = None if rows.labels is None else rows.sequence_labels
        if there is not None and rows.labels is not None:
            each = rows.labels if rows.labels.shape[1] == mask.shape[1] else rows.labels.expand(-1, mask.shape[1], -1)
            labels = each[mask]

        def run(change: Tensor) -> Tensor:
            added = spread(change, mask, self._pool)
            added = added if found[0].ndim == 3 else added[:, 0]
            return self._rows(self._run(batch, lambda activation: activation + added.to(activation.dtype)), there)

        shown = self._rows(outputs, there)
        return RunBatch(
            rows.x[rows.mask],
            shown,
            self._named(shown.shape[1]),
            first + (torch.arange(len(mask), device=mask.device) if there is None else mask.nonzero()[:, 0]),
            labels,
            run,
        )

    def _run(self, batch: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The outputs of a forward whose first activation at the hook point is passed through `change`."""
        visits = 0

        def visit(activation: Tensor) -> Tensor:
            nonlocal visits
            visits += 1
            return change(activation) if visits == 1 else activation

        with self._forward.alone(), self._forward.sites[0].replaced(visit), self._site.capture() as captured:
            try:
                self._forward.call(batch)
                outputs = captured.value
            except UsageError as error:
                if f"hook point {self._site.name!r}" not in str(error):
                    raise
                raise OptionError("output", f"{error}") from None
        if not visits:
            raise self._forward.sites[0].not_reached()
        return outputs

    def _check(self, outputs: Tensor, mask: Tensor, where: str) -> None:
        n, length = mask.shape
        fits = outputs.ndim in (1, 2) or (outputs.ndim == 3 and outputs.shape[1] == length)
        if outputs.ndim == 0 or len(outputs) != n or not fits or not outputs.is_floating_point():
            raise OptionError(
                "output",
                f"it is {described(outputs)} for the {n} rows of {length} positions of {where}. Name floating-point numbers [n], "
                "[n, outputs] or [n, T, outputs], such as .[logits].",
            )

    @staticmethod
    def _rows(outputs: Tensor, there: Tensor | None) -> Tensor:
        """[k, n_outputs]."""
        return outputs[there] if there is not None else outputs.reshape(len(outputs), -1)

    def _named(self, n: int) -> Sequence[str]:
        if self._names is None:
            return [f"output {column}" for column in range(n)]
        if len(self._names) != n:
            raise OptionError("output_names", f"it names {len(self._names)} outputs and there are {n}. Give a name for each.")
        return self._names
