"""`Forward`: one batch through a module of the user's up to the hook point, as rows with their masks and labels."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saekit.activations.sites import Site, run_to_sites
from saekit.builtin.sources.batches import Part, arguments, described, moved, part_of
from saekit.builtin.sources.pooling import BatchRows, Pool, columns_of, labels_of, mask_of, pooled
from saekit.builtin.sources.users_code import MadeBy, failure
from saekit.errors import OptionError, SaekitError, UsageError


class Forward:
    """A module and what of its batches are arguments, masks and labels.

    network: on its device. name, data: what the module and the batches are called, for messages. concepts: the names of the
    columns of labels; if there are none, the first batch names them. The other parameters are options of `ModuleSource`.
    """

    def __init__(
        self,
        network: nn.Module,
        sites: Sequence[Site],
        *,
        name: str,
        data: str,
        device: torch.device,
        dtype: torch.dtype,
        args: list[Part] | None,
        keywords: dict[str, Any],
        mask: Part | MadeBy | None,
        pool: Pool,
        labels: Part | MadeBy | None,
        concepts: list[str],
    ) -> None:
        self.network, self.sites, self.concepts = network, sites, concepts
        self._name, self.data, self._device, self._dtype = name, data, device, dtype
        self._args, self._keywords, self._mask, self._pool, self._labels = args, keywords, mask, pool, labels
        self._lock = threading.Lock()  # hooks belong to the module, not to a thread
        self.widths: tuple[int, ...] = ()
        """The width at each site, once a batch has been run."""
        self.labels_by_position = False
        self.by_position = False
        """Whether each row is one position of several, once a batch has been run."""

    def where(self, number: int) -> str:
        """A batch, for messages."""
        return f"batch {number} of {self.data}"

    def rows(self, batch: Any, number: int) -> BatchRows:
        """Batch `number` through the module, up to the hook point."""
        with self.alone():
            found = run_to_sites(self.sites, lambda: self.call(batch))
        return self.rows_of(batch, number, found)

    def rows_of(self, batch: Any, number: int, found: list[Tensor]) -> BatchRows:
        """The rows of batch `number`. found: the activation at each site."""
        where = self.where(number)
        self._check(found, where)
        x, target = found[0], found[1] if len(found) > 1 else None
        mask = self.mask(batch, x, where)
        self.by_position = x.ndim == 3 and self._pool == "none"
        if x.ndim == 2:
            x, target = x[:, None], None if target is None else target[:, None]
        labels = None if self._labels is None else self._labels_of(batch, len(x), x.shape[1], where)
        if self._pool != "none":
            x, target = pooled(x, mask, self._pool), None if target is None else pooled(target, mask, self._pool)
            if labels is not None and labels.ndim == 3:
                raise OptionError("labels", f'{where} has one for each position, which pool = "{self._pool}" makes one. Give [n].')
            mask = torch.ones_like(mask[:, :1])
        if labels is not None:
            self.labels_by_position |= labels.ndim == 3
            labels = labels if labels.ndim == 3 else labels[:, None].expand(-1, x.shape[1], -1)
        return BatchRows(x.to(self._dtype), None if target is None else target.to(self._dtype), mask, labels)

    def known_rows(self, batch: Any) -> list[bool] | None:
        """Which rows of a batch have a label, without running the module; None if that cannot be told."""
        value = part_of(batch, self._labels, "labels", self.data)
        if self.labels_by_position or not isinstance(value, Tensor | list | tuple):
            return None
        return [_is_known(one) for one in value]

    def mask(self, batch: Any, x: Tensor, where: str) -> Tensor:
        """Which positions of the activation `x` ([n, d] or [n, T, d]) count before any pooling: [n, T], T = 1 without positions."""
        if self._mask is not None:
            return mask_of(part_of(batch, self._mask, "mask", self.data), x, where)
        return torch.ones(x.shape[:2] if x.ndim == 3 else (len(x), 1), dtype=torch.bool, device=x.device)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nothing else runs the module inside, and no gradients are kept."""
        with self._lock, torch.no_grad():
            yield

    def call(self, batch: Any) -> Any:
        """What the module returns for a batch; only inside `alone`."""
        args, kwargs = arguments(moved(batch, self._device), self._args, self.data)
        try:
            return self.network(*args, **kwargs, **self._keywords)
        except SaekitError:
            raise
        except Exception as error:
            raise OptionError(
                "module",
                f"{self._name} cannot run on a batch of {self.data} "
                f"({described(batch)}): {failure(error)}. Name the items that it takes in args, such as [0].",
            ) from error

    def _labels_of(self, batch: Any, n: int, length: int, where: str) -> Tensor:
        value = part_of(batch, self._labels, "labels", self.data)
        if not self.concepts:
            self.concepts = [f"label {column}" for column in range(columns_of(value))]
        return labels_of(value, self.concepts, n, length, where).to(self._device)

    def _check(self, found: list[Tensor], where: str) -> None:
        """UsageError for an activation that is not rows of numbers, or has another width than those before."""
        for site, x in zip(self.sites, found, strict=True):
            if x.ndim not in (2, 3) or not x.is_floating_point() or x.shape[:-1] != found[0].shape[:-1]:
                raise UsageError(
                    f"hook point {site.name!r}: the activation is {described(x)}; floating-point numbers [n, d] or "
                    "[n, T, d] are needed. Name another hook point, or bring it into that shape in a submodule."
                )
        widths = tuple(x.shape[-1] for x in found)
        if self.widths and widths != self.widths:
            raise UsageError(
                f"hook point {self.sites[0].name!r}: the activation of {where} has the width {widths[0]}, and those before "
                f"{self.widths[0]}. Name a hook point whose width is always the same."
            )
        self.widths = widths


def _is_known(label: Any) -> bool:
    """Whether a row's label, or one of several, is known."""
    if isinstance(label, Tensor):
        return bool((~label.isnan()).any()) if label.is_floating_point() else bool((label >= 0).any())
    if isinstance(label, list | tuple):
        return any(map(_is_known, label))
    return label is not None and label == label and not (isinstance(label, int) and label < 0)
