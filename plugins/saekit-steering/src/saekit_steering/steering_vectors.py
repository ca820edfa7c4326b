"""What is added to the activations: a latent's decoder row, or another direction of the same norm, at some strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import saekit
from saekit import Attachment, Code, SparseAutoencoder, Subject

Unit = Literal["norm", "absolute", "max", "rms"]
AFTER_FIRST = slice(1, None)
"""Where is steered: the SAE never read a first position, and much of a model's attention rests there."""


class Directions(SparseAutoencoder):
    """Directions [n, d_in] as a dictionary that only steers: what `saekit.add` does with them needs no encoder."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows.shape[1], rows.shape[0], decoder_norm="free")
        self.W_dec = nn.Parameter(rows.detach().clone(), requires_grad=False)
        self.to(rows.device)

    def gate(self, x: Tensor) -> Code:
        raise NotImplementedError("directions are added and not read")


@dataclass(frozen=True)
class Strength:
    """A strength as it was asked for, `given` in `unit`, and what it is. absolute: what is added to the latent's
    activation. norm: the length of what is added to the model's activation."""

    given: float
    unit: Unit
    absolute: float
    norm: float

    @property
    def name(self) -> str:
        """As it stands in the names of files: `15.0`, or `0.5max` in units of the maximum."""
        return f"{self.given}" if self.unit == "absolute" else f"{self.given}{self.unit}"


@dataclass(frozen=True)
class Push:
    """A direction and how much of it. kind: "latent", "random", or "other latent". number: which of its kind.

    sae, row: the dictionary and its row; `scale` times `strength.absolute` of it is added, so that every push of one
    strength is equally long."""

    kind: str
    number: int
    sae: SparseAutoencoder
    row: int
    scale: float
    strength: Strength

    def edit(self, subject: Subject) -> Attachment:
        """The edit, not yet entered, at the site that the SAE reads."""
        added = saekit.add(self.scale * self.strength.absolute)
        return saekit.attach(subject.model, self.sae, subject.site, edits={self.row: added}, positions=AFTER_FIRST)

    def added_to(self, activation: Tensor) -> Tensor:
        """What `edit` passes on in place of an activation [n, T, d]."""
        pushed = activation.clone()
        row = self.sae.W_dec[self.row].detach()
        pushed[:, AFTER_FIRST] += (self.scale * self.strength.absolute * row).to(activation)
        return pushed


def strengths(given: Sequence[float], unit: Unit, size: float, row_norm: float) -> list[Strength]:
    """The strengths, in their order. size: how much of the latent's activation one `unit` is. row_norm: of the latent's
    decoder row."""
    return [Strength(value, unit, value * size, abs(value) * size * row_norm) for value in given]


def latent_pushes(sae: SparseAutoencoder, latent: int, sweep: Sequence[Strength]) -> list[Push]:
    """The steered latent at every strength."""
    return [Push("latent", 0, sae, latent, 1.0, strength) for strength in sweep]


def random_pushes(sae: SparseAutoencoder, latent: int, sweep: Sequence[Strength], n: int, seed: int) -> list[Push]:
    """`n` directions drawn evenly from the sphere, as long as the latent's decoder row, at every strength."""
    generator = torch.Generator().manual_seed(seed)
    rows = nn.functional.normalize(torch.randn(n, sae.d_in, generator=generator), dim=1)
    rows = rows.to(sae.W_dec) * sae.W_dec[latent].detach().norm()
    directions = Directions(rows)
    return [Push("random", i, directions, i, 1.0, strength) for i in range(n) for strength in sweep]


def other_pushes(
    sae: SparseAutoencoder, latent: int, living: Tensor, sweep: Sequence[Strength], n: int, seed: int
) -> list[Push]:
    """`n` other latents (fewer where fewer live), drawn from `living` [d_sae] booleans, each as long at each strength."""
    free = living.clone()
    free[latent] = False
    candidates = free.nonzero().flatten().cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = candidates[torch.randperm(len(candidates), generator=generator)[:n]].tolist()
    norms = sae.W_dec.detach().norm(dim=1)
    return [
        Push("other latent", j, sae, j, float(norms[latent] / norms[j].clamp_min(1e-12)), strength)
        for j in drawn
        for strength in sweep
    ]
