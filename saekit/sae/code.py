"""`Code`: what the encoder of an SAE returns. A `SparseCode` stores only the active latents, a `DenseCode` all of them.

Losses, metrics and analyzers read a code through the operations below, which give the same values and gradients in both
forms. Only `dense()` builds [batch, d_sae].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from saekit.sae.kernels import Pattern

OfLatents = Callable[["Tensor | None"], Tensor]
"""From latents [n], or None for all of them, to a value of each in each row: [batch, n]."""


class Code(ABC):
    """The latents' activations of a batch.

    d_sae: number of latents. `len(code)` is the number of rows.
    """

    d_sae: int

    def __init__(self, pre_activations: OfLatents | None, margins: OfLatents | None = None) -> None:
        self._pre_activations, self._margins = pre_activations, margins

    def pre(self, latents: Tensor | None = None) -> Tensor:
        """Pre-activations of some latents (all if None), before any gating: [batch, n].

        They are computed again from the batch, with gradients to the encoder, so ask for few latents."""
        if self._pre_activations is None:
            raise ValueError("This code was not made by an encoder, so it has no pre-activations.")
        return self._pre_activations(latents)

    def margin(self, latents: Tensor | None = None) -> Tensor:
        """How far some latents (all if None) are from just firing, in units of their pre-activations: [batch, n].

        Positive where a latent fires, negative where it does not, and 0 at what it must exceed, which the architecture
        says (`threshold` of `SparseAutoencoder.sparse_code`). The gradient is that of `pre`, so silent latents have one."""
        if self._margins is None:
            raise ValueError("This code was not made by an encoder, so nothing says when its latents fire.")
        return self._margins(latents)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sum(self) -> Tensor:
        """Sum of each row's activations: [batch]. For codes that are never negative this is their L1 norm."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum of each row's activations times `weights` [d_sae]: [batch]."""

    @abstractmethod
    def square_sum(self) -> Tensor:
        """Sum of each row's squared activations: [batch]."""

    @abstractmethod
    def count(self) -> Tensor:
        """Number of latents that are not zero in each row, as floats without a gradient: [batch]."""

    @abstractmethod
    def column(self, latent: int) -> Tensor:
        """Activation of one latent in each row: [batch]."""

    @abstractmethod
    def columns(self, latents: Tensor) -> Tensor:
        """Activations of some latents: [batch, n]."""

    @abstractmethod
    def fired(self) -> Tensor:
        """Number of rows in which each latent is not zero, without a gradient: [d_sae] int64."""

    @abstractmethod
    def nonzero(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, latents, values) of all activations that are not zero, row after row: [nnz] each."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The whole code: [batch, d_sae]. The only operation that builds a matrix of this size from a `SparseCode`."""


class SparseCode(Code):
    """A list of (latent, activation) pairs for each row. An activation may be zero (a top-k value cut by the ReLU)."""

    def __init__(
        self,
        pattern: Pattern,
        values: Tensor,
        pre_activations: OfLatents | None = None,
        gates: Tensor | None = None,
        margins: OfLatents | None = None,
    ) -> None:
        super().__init__(pre_activations, margins)
        self.pattern = pattern
        self.values = values  # [nnz]
        self.gates = gates  # [nnz], summed by the architecture's own sparsity loss; None if it has no gate to learn
        self.d_sae = pattern.d_sae

    def __len__(self) -> int:
        return self.pattern.batch

    def _row_sum(self, entries: Tensor) -> Tensor:
        if self.pattern.k:
            return entries.view(len(self), self.pattern.k).sum(1)
        return entries.new_zeros(len(self)).index_add(0, self.pattern.rows, entries)

    def sum(self) -> Tensor:
        return self._row_sum(self.values)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self._row_sum(self.values * weights[self.pattern.indices])

    def square_sum(self) -> Tensor:
        return self._row_sum(self.values.square())

    def count(self) -> Tensor:
        return self._row_sum((self.values.detach() != 0).to(self.values.dtype))

    def gate_sum(self) -> Tensor:
        """Sum of each row's gates, with the architecture's own gradient: [batch]. ValueError if there are none."""
        if self.gates is None:
            raise ValueError("This architecture has no gates to learn.")
        return self._row_sum(self.gates)

    def column(self, latent: int) -> Tensor:
        return self._row_sum(self.values * (self.pattern.indices == latent))

    def columns(self, latents: Tensor) -> Tensor:
        place = torch.full((self.d_sae,), -1, dtype=torch.long, device=latents.device)
        place[latents] = torch.arange(latents.shape[0], device=latents.device)
        slot = place[self.pattern.indices]  # [nnz], -1 if the entry's latent is not asked for
        wanted = slot >= 0
        flat = self.pattern.rows[wanted] * latents.shape[0] + slot[wanted]
        gathered = self.values.new_zeros(len(self) * latents.shape[0]).index_add(0, flat, self.values[wanted])
        columns = gathered.view(len(self), latents.shape[0])
        return columns if _distinct(place, latents) else columns[:, place[latents]]

    def fired(self) -> Tensor:
        active = (self.values.detach() != 0).to(torch.long)
        return torch.zeros(self.d_sae, dtype=torch.long, device=active.device).index_add_(0, self.pattern.indices, active)

    def nonzero(self) -> tuple[Tensor, Tensor, Tensor]:
        keep = self.values.detach() != 0
        return self.pattern.rows[keep], self.pattern.indices[keep], self.values[keep]

    def dense(self) -> Tensor:
        flat = self.pattern.rows * self.d_sae + self.pattern.indices
        return self.values.new_zeros(len(self) * self.d_sae).index_add(0, flat, self.values).view(len(self), self.d_sae)


def _distinct(place: Tensor, latents: Tensor) -> bool:
    """Whether no latent was asked for twice (the later of two overwrites the place of the earlier)."""
    return bool((place[latents] == torch.arange(latents.shape[0], device=latents.device)).all())


class DenseCode(Code):
    """A code stored as [batch, d_sae], for gates that are not sparse, or not yet."""

    def __init__(
        self, activations: Tensor, pre_activations: OfLatents | None = None, margins: OfLatents | None = None
    ) -> None:
        super().__init__(pre_activations, margins)
        self.activations = activations  # [batch, d_sae]
        self.d_sae = activations.shape[1]

    def __len__(self) -> int:
        return self.activations.shape[0]

    def sum(self) -> Tensor:
        return self.activations.sum(1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.activations @ weights

    def square_sum(self) -> Tensor:
        return self.activations.square().sum(1)

    def count(self) -> Tensor:
        return (self.activations.detach() != 0).sum(1).to(self.activations.dtype)

    def column(self, latent: int) -> Tensor:
        return self.activations[:, latent]

    def columns(self, latents: Tensor) -> Tensor:
        return self.activations[:, latents]

    def fired(self) -> Tensor:
        return (self.activations.detach() != 0).sum(0)

    def nonzero(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, latents = self.activations.detach().nonzero(as_tuple=True)
        return rows, latents, self.activations[rows, latents]

    def dense(self) -> Tensor:
        return self.activations
