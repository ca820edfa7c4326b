"""`AgainstControls`: an effect beside its controls, as numbers and as one sentence; `matched_latents`: what controls can be."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ENOUGH_SPREADS = 2.0
"""An effect exceeds its controls if it lies at least this many of their standard deviations beyond their mean."""
FEW = 10
"""With fewer controls than this the sentence says how often chance alone would put the effect first."""

NEIGHBOURS = 8
"""How many of the most similar latents a matched one is drawn from."""


@dataclass(frozen=True)
class AgainstControls:
    """An effect and the same measurement of controls: other latents, random directions, shuffled labels.

    effect: None or NaN where it is not defined.
    controls: those that are None, NaN or infinite are left out of every number, and the sentence counts them.
    higher: False if the effect is a low number.

    >>> gain = AgainstControls(2.88, (1.5, 2.0, 2.2, 3.21))
    >>> gain.exceeds
    False
    >>> print(gain.sentence("gain", "other latents"))
    The gain of 2.88 does not exceed its controls: 1 of 4 other latents reaches as much, up to 3.21 (mean 2.23, standard \
deviation 0.718; the effect is 0.91 of them above the mean).
    """

    effect: float | None
    controls: tuple[float | None, ...]
    higher: bool = True

    @classmethod
    def of(cls, effect: float | None, controls: Iterable[float | None], *, higher: bool = True) -> AgainstControls:
        """The same from any sequence of controls."""
        return cls(effect, tuple(controls), higher)

    @property
    def finite(self) -> tuple[float, ...]:
        """The controls that are numbers."""
        return tuple(float(c) for c in self.controls if c is not None and math.isfinite(c))

    @property
    def mean(self) -> float | None:
        """The mean of the controls; None if there are none."""
        return statistics.fmean(self.finite) if self.finite else None

    @property
    def spread(self) -> float | None:
        """The sample standard deviation of the controls (n - 1); None if there are fewer than two."""
        return statistics.stdev(self.finite) if len(self.finite) > 1 else None

    @property
    def reaching(self) -> int:
        """How many controls are at least as large as the effect; as small, if the effect is a low number."""
        return sum(self._beyond(control) >= 0 for control in self.finite) if self._known else 0

    @property
    def best(self) -> float | None:
        """The control that comes nearest to the effect or goes furthest beyond it; None if there are none."""
        return (max if self.higher else min)(self.finite, default=None)

    @property
    def spreads(self) -> float | None:
        """How far the effect lies beyond the mean of the controls, in their standard deviations; negative if it falls short.

        None if it is undefined: `undefined` says why."""
        if self.undefined:
            return None
        assert self.mean is not None and self.spread is not None
        return -self._beyond(self.mean) / self.spread

    @property
    def undefined(self) -> str | None:
        """Why `spreads` is None; None if it is a number."""
        if not self._known:
            return "the effect is not defined"
        if not self.finite:
            return "there are no controls" if not self.controls else "no control gave a number"
        if self.spread is None:
            return "a single control has no spread"
        return "all controls are equal" if self.spread == 0 else None

    @property
    def exceeds(self) -> bool:
        """Whether the effect is beyond every control and at least `ENOUGH_SPREADS` standard deviations beyond their mean.

        False if there are fewer than two controls: nothing is known of their spread then."""
        if not self._known or self.spread is None or self.reaching:
            return False
        return self.spreads is None or self.spreads >= ENOUGH_SPREADS

    def sentence(self, effect: str, controls: str) -> str:
        """Whether the effect exceeds its controls, and by how much of their spread.

        effect: what was measured, as in "gain".
        controls: what the controls are, in the plural, as in "other latents".
        """
        controls = f"{controls} ({len(self.controls) - len(self.finite)} more gave no number)" if self._left_out else controls
        if not self._known:
            return f"The {effect} is not defined, so it cannot be compared with its controls ({len(self.finite)} {controls})."
        own, n = f"The {effect} of {_text(self.effect)}", len(self.finite)
        if not n:
            return f"{own} has no controls beside it: {self.undefined} ({controls})."
        exceed, as_much, most = ("exceed", "as much", "most") if self.higher else ("fall below", "as little", "least")
        if n == 1:
            beyond = "reaches" if self.reaching else "does not reach"
            return (
                f"{own} has a single control beside it, which {beyond} {as_much} ({_text(self.best)}; {controls}): that is too "
                "few to say by how much it differs from chance."
            )
        if self.exceeds:
            verb = "exceeds" if self.higher else "falls below"
            found = f"{verb} its controls: {n} {controls} reach {_text(self.best)} at {most}"
        elif self.reaching:
            reach = "reaches" if self.reaching == 1 else "reach"
            beyond = "" if self.best == self.effect else f", {'up' if self.higher else 'down'} to {_text(self.best)}"
            found = f"does not {exceed} its controls: {self.reaching} of {n} {controls} {reach} {as_much}{beyond}"
        else:
            found = (
                f"does not clearly {exceed} its controls: none of {n} {controls} reaches {as_much} ({_text(self.best)} at "
                f"{most}), but it is not {ENOUGH_SPREADS:g} of their standard deviations from their mean"
            )
        return f"{own} {found} ({self._distance}).{self._by_chance()}"

    # --- details ----------------------------------------------------------------------------------------------------

    @property
    def _known(self) -> bool:
        return self.effect is not None and math.isfinite(self.effect)

    @property
    def _left_out(self) -> bool:
        return bool(self.finite) and len(self.finite) < len(self.controls)

    def _beyond(self, other: float) -> float:
        """How far another value goes beyond the effect."""
        assert self.effect is not None
        return other - self.effect if self.higher else self.effect - other

    @property
    def _distance(self) -> str:
        mean = f"mean {_text(self.mean)}"
        if self.spread == 0:
            return f"{mean}; all of them are equal"
        assert self.spreads is not None
        above = "above" if (self.spreads >= 0) == self.higher else "below"
        spread = f"standard deviation {_text(self.spread)}"
        far = f"{abs(self.spreads):.{2 if abs(self.spreads) < 10 else 0}f}"
        return f"{mean}, {spread}; the effect is {far} of them {above} the mean"

    def _by_chance(self) -> str:
        n = len(self.finite) + 1
        if not self.exceeds or n > FEW:
            return ""
        return f" With so few controls it would come first by chance 1 time in {n}."


def _text(value: float | None) -> str:
    assert value is not None
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def matched_latents(chosen: Sequence[int], density: Tensor, size: Tensor, generator: torch.Generator) -> list[int]:
    """For each chosen latent a similar one, drawn from the nearest in log density and log size; none of `chosen`, and none twice.

    density, size: [d_sae] each, the share of positions of some text at which a latent is active, and how strongly it is there
        (its mean or its RMS). Only latents that are active on this text are drawn; if these run out, there are fewer than
        `chosen`.
    generator: on the CPU."""
    import torch

    density, size = density.cpu(), size.cpu().abs()
    free = density > 0
    free[list(chosen)] = False
    place = torch.stack([density.clamp_min(1e-9).log(), size.clamp_min(1e-9).log()], dim=1)  # [d_sae, 2]
    drawn: list[int] = []
    for latent in chosen:
        candidates = free.nonzero()[:, 0]
        if not len(candidates):
            break
        distance = (place[candidates] - place[latent]).square().sum(1)
        near = candidates[distance.topk(min(NEIGHBOURS, len(candidates)), largest=False).indices]
        drawn.append(int(near[torch.randint(len(near), (1,), generator=generator)]))
        free[drawn[-1]] = False
    return drawn
