"""Steering vectors: a latent's decoder row, or a control direction of the same norm, at some strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import saekit
from saekit import Attachment, Code, SparseAutoencoder, Subject

Unit = Literal["norm", "absolute", "max", "rms"]
Kind = Literal["latent", "random", "random covariance", "other latent"]
KINDS: dict[Kind, str] = {
    "latent": "the latent",
    "random": "random directions",
    "random covariance": "random directions with the activations' covariance",
    "other latent": "other latents",
}
"""Every kind of direction, the steered latent first and its controls after it, in words."""


class Directions(SparseAutoencoder):
    """Directions [n, d_in] as a dictionary for steering alone: `saekit.add` needs no encoder. They are added where `sae` is."""

    def __init__(self, rows: Tensor, sae: SparseAutoencoder) -> None:
        super().__init__(rows.shape[1], rows.shape[0], decoder_norm="free")
        self.W_dec = nn.Parameter(rows.detach().clone(), requires_grad=False)
        self.trained_positions = sae.trained_positions
        self.to(rows.device)

    def gate(self, x: Tensor) -> Code:
        raise NotImplementedError("directions are added, not read")


@dataclass(frozen=True)
class Strength:
    """A strength, `given` in `unit`. absolute: the amount added to the latent's activation. norm: the length of the vector
    added to the model's activation."""

    given: float
    unit: Unit
    absolute: float
    norm: float

    @property
    def name(self) -> str:
        """The strength in file names: `15.0`, or `0.5max` in units of the maximum."""
        return f"{self.given}" if self.unit == "absolute" else f"{self.given}{self.unit}"

    @property
    def signed_norm(self) -> float:
        """The norm with the sign of the strength."""
        return self.norm if self.given > 0 else -self.norm


@dataclass(frozen=True)
class SteeringVector:
    """A direction with a strength. kind: one of `KINDS`. number: which of its kind.

    sae, row: the dictionary and the row, of which `scale` times `strength.absolute` is added, so that all vectors of
        one strength have the same norm."""

    kind: Kind
    number: int
    sae: SparseAutoencoder
    row: int
    scale: float
    strength: Strength

    def edit(self, subject: Subject) -> Attachment:
        """The edit at the site that the SAE reads, at every position that it was trained on; it has not been entered."""
        added = saekit.add(self.scale * self.strength.absolute)
        steered = self.sae.trained_positions.with_bos(subject.bos_token_id)
        return saekit.attach(subject.model, self.sae, subject.site, edits={self.row: added}, positions=steered)

    def added_to(self, activation: Tensor, steered: Tensor) -> Tensor:
        """What `edit` passes on in place of `activation` [n, T, d]. steered: [n, T], the positions that it edits."""
        added = (self.scale * self.strength.absolute * self.sae.W_dec[self.row].detach()).to(activation)
        return activation + steered.to(activation.device)[..., None] * added


def strengths(given: Sequence[float], unit: Unit, size: float, row_norm: float) -> list[Strength]:
    """The strengths in their order. size: how much of the latent's activation one `unit` is. row_norm: of the latent's
    decoder row."""
    return [Strength(value, unit, value * size, abs(value) * size * row_norm) for value in given]


def latent_vectors(sae: SparseAutoencoder, latent: int, sweep: Sequence[Strength]) -> list[SteeringVector]:
    """The latent's decoder row at every strength."""
    return [SteeringVector("latent", 0, sae, latent, 1.0, strength) for strength in sweep]


def on_the_sphere(n: int, d: int, seed: int) -> Tensor:
    """`n` random directions, every one of them as likely: [n, d]."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def random_vectors(
    sae: SparseAutoencoder, latent: int, directions: Tensor, sweep: Sequence[Strength], kind: Kind = "random"
) -> list[SteeringVector]:
    """Drawn directions [n, d_in] with the norm of the latent's decoder row, at every strength."""
    rows = nn.functional.normalize(directions.double(), dim=1).to(sae.W_dec) * sae.W_dec[latent].detach().norm()
    drawn = Directions(rows, sae)
    return [SteeringVector(kind, i, drawn, i, 1.0, strength) for i in range(len(rows)) for strength in sweep]


def other_latent_vectors(
    sae: SparseAutoencoder, latent: int, living: Tensor, sweep: Sequence[Strength], n: int, seed: int
) -> list[SteeringVector]:
    """Decoder rows of `n` other latents at every strength, scaled to the same norm; drawn from `living`, [d_sae] booleans,
    and fewer if there are not enough."""
    free = living.clone()
    free[latent] = False
    candidates = free.nonzero().flatten().cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = candidates[torch.randperm(len(candidates), generator=generator)[:n]].tolist()
    norms = sae.W_dec.detach().norm(dim=1)
    return [
        SteeringVector("other latent", j, sae, j, float(norms[latent] / norms[j].clamp_min(1e-12)), strength)
        for j in drawn
        for strength in sweep
    ]
