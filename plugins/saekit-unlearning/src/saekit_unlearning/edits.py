"""Edits of an SAE's latents at its site, as functions of passages, on one of two paths that are never mixed.

`spliced`: the reconstruction of the edited code takes the activation's place. `error_kept`: only the change that the edit
makes to the reconstruction is added to the activation, so whatever the SAE does not rebuild stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from saekit import Code, SparseAutoencoder, SparseCode
from saekit_unlearning.passages import Passages

Path = Literal["spliced", "error_kept"]
PATHS: tuple[Path, ...] = get_args(Path)


@dataclass(frozen=True)
class Ablate:
    """Active latents are set to 0."""

    def __call__(self, active: Tensor, latents: Tensor) -> Tensor:
        return torch.zeros_like(active)


@dataclass(frozen=True)
class Clamp:
    """Latents are set to -`value` where they are active, and nowhere else (Farrell, Lau and Conmy 2024; SAEBench).

    units: [d_sae], what `value` is multiplied by, such as each latent's RMS activation; None for absolute units.
    """

    value: float
    units: Tensor | None = None

    def __call__(self, active: Tensor, latents: Tensor) -> Tensor:
        size = (
            active.new_full((len(latents),), self.value)
            if self.units is None
            else self.value * self.units[latents].to(active)
        )
        return torch.where(active > 0, -size, active)


@dataclass(frozen=True)
class Gates:
    """Each latent's activation is multiplied by its gate.

    gates: [n], one for each edited latent, which may be trained.
    """

    gates: Tensor

    def __call__(self, active: Tensor, latents: Tensor) -> Tensor:
        return active * self.gates.to(active)


Operation = Ablate | Clamp | Gates
"""From activations [m, n] of edited latents [n] to new ones."""


class Codes:
    """From passages to their code, encoded once for all edits of an SAE that does not change meanwhile.

    Codes that are not sparse are encoded anew each time: they would fill the memory."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        self._known: dict[int, tuple[Passages, Code]] = {}  # by the passages' id, which they keep while they are here

    @torch.no_grad()
    def __call__(self, passages: Passages) -> Code:
        if id(passages) in self._known:
            return self._known[id(passages)][1]
        code = self.sae.encode(passages.x.to(self.sae.W_dec))
        if isinstance(code, SparseCode):
            self._known[id(passages)] = passages, code
        return code


class LatentEdit:
    """An edit of some latents of an SAE, on one path: the `SiteEdit` of passages.

    latents: [n]; with none of them, "spliced" is the reconstruction alone and "error_kept" changes nothing.
    codes: what encodes the passages; by default the SAE as it is at the time.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        latents: Tensor,
        operation: Operation,
        path: Path,
        codes: Callable[[Passages], Code] | None = None,
    ) -> None:
        self.sae, self.latents, self.operation, self.path = sae, latents.to(sae.W_dec.device), operation, path
        self.codes = codes or (lambda passages: sae.encode(passages.x.to(sae.W_dec)))

    def __call__(self, passages: Passages) -> Tensor:
        x = passages.x  # [m, d]
        with torch.set_grad_enabled(gradients(x)):
            code = self.codes(passages)
            base = x if self.path == "error_kept" else self.sae.decode(code).to(x)
            active = code.columns(self.latents)  # [m, n]
        change = (self.operation(active, self.latents) - active) @ self.sae.W_dec[self.latents].detach()  # [m, d]
        return passages.with_x(base + change.to(base))


Parts = Callable[[Passages], tuple[Tensor, Tensor]]
"""From passages to (what rows are added to [m, d], the activations of the latents that push, which multiply them [m, n])."""


def parts_of(sae: SparseAutoencoder, latents: Tensor, path: Path) -> Parts:
    """The parts of latents [n] of an SAE: the activation or, on the path "spliced", its reconstruction by the SAE as it is; and
    what the latents are active with."""
    latents = latents.to(sae.W_dec.device)

    def parts(passages: Passages) -> tuple[Tensor, Tensor]:
        x = passages.x
        with torch.set_grad_enabled(gradients(x)):
            code = sae.encode(x.to(sae.W_dec))
            return (x if path == "error_kept" else sae.decode(code).to(x)), code.columns(latents)

    return parts


@dataclass(frozen=True)
class Pushing:
    """Rows [n, d] that push wherever their latents are active: a `SiteEdit`. On the path "error_kept" the activation keeps its
    bits where none is."""

    parts: Parts
    rows: Tensor

    def __call__(self, passages: Passages) -> Tensor:
        base, active = self.parts(passages)
        return passages.with_x(base + (active @ self.rows).to(base))


def gradients(x: Tensor) -> bool:
    """Whether gradients go through the code: only where layers below the site are trained, as in relearning."""
    return x.requires_grad and torch.is_grad_enabled()
