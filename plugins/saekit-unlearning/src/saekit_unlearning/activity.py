"""How often and how strongly each latent is active on texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit import SparseAutoencoder
from saekit_unlearning.passages import Passages


@dataclass(frozen=True)
class Activity:
    """count: [d_sae], at how many positions each latent is active. squares: [d_sae], the sum of its squared activations.
    positions: how many there are."""

    count: Tensor
    squares: Tensor
    positions: int

    @classmethod
    @torch.no_grad()
    def of(cls, sae: SparseAutoencoder, passages: Iterable[Passages]) -> Activity:
        """That on passages, at the positions that the SAE was trained on."""
        count, squares = (torch.zeros(sae.d_sae, dtype=torch.float64, device=sae.W_dec.device) for _ in range(2))
        positions = 0
        for some in passages:
            code = sae.encode(some.x.to(sae.W_dec))
            _, latents, values = code.nonzero()
            count += code.fired()
            squares.index_add_(0, latents, values.double().square())
            positions += len(code)
        return cls(count, squares, positions)

    def __add__(self, other: Activity) -> Activity:
        """That on both."""
        return Activity(self.count + other.count, self.squares + other.squares, self.positions + other.positions)

    @property
    def rate(self) -> Tensor:
        """The share of positions at which a latent is active: [d_sae]."""
        return (self.count / max(self.positions, 1)).float()

    @property
    def rms(self) -> Tensor:
        """The root mean square of a latent's activations that are not zero, 0 if there are none: [d_sae]."""
        return (self.squares / self.count.clamp_min(1)).sqrt().float()
