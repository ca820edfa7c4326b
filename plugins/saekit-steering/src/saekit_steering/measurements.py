"""`Measurements`: everything that a steering experiment measured, and the effect curves and changes drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from saekit_steering.activation_statistics import ActivationStatistics
from saekit_steering.cluster import Classes, Cluster, sign_agreement
from saekit_steering.continuations import Continuation
from saekit_steering.effect_curve import EffectCurve
from saekit_steering.prompts import NEUTRAL, UNRELATED
from saekit_steering.scoring import Scored
from saekit_steering.steering_vectors import SteeringVector

if TYPE_CHECKING:
    from saekit_steering.steer import Steer

Curves = dict[tuple[str, int], EffectCurve]
"""By the kind of a direction and its number."""


@dataclass(frozen=True)
class Measurements:
    """kinds: of the prompts, in the order of their file. concept: its name. vectors: the latent's at every strength, then
    those of the controls. Vectors are numbered as in `vectors`."""

    settings: Steer
    kinds: list[str]
    concept: str
    cluster: Cluster
    classes: Classes
    statistics: ActivationStatistics
    vectors: list[SteeringVector]
    scored: Scored
    written: list[Continuation]

    def curves(self) -> Curves:
        """The effect on neutral prompts and the damage on unrelated ones over the strengths, for each direction."""
        groups: dict[tuple[str, int], list[int]] = {}
        for number, vector in enumerate(self.vectors):
            groups.setdefault((vector.kind, vector.number), []).append(number)
        unsteered = self.scored.unsteered[NEUTRAL].mean("log_odds")
        curves = {}
        for key, numbers in groups.items():
            numbers.sort(key=lambda n: self.vectors[n].strength.given)
            scores = [self.scored.steered[n] for n in numbers]
            curves[key] = EffectCurve(
                [self.vectors[n].strength.signed_norm for n in numbers],
                [s[NEUTRAL].mean("log_odds") - unsteered for s in scores],
                [s[UNRELATED].mean("kl") for s in scores],
            )
        return curves

    def gain_to_match(self, own: EffectCurve) -> float | None:
        """The gain at which KL is compared: the option `effect`, or half of the largest of `own`, the latent's curve."""
        return self.settings.effect or (own.largest / 2 if own.largest > 0 else None)

    def change(self, number: int, name: str, kind: str = NEUTRAL) -> Tensor | None:
        """The pooled change of f or g under a vector, on prompts of a kind: [m]; None if it was not read."""
        before, after = (s[kind].pooled(name) for s in (self.scored.unsteered, self.scored.steered[number]))
        return None if before is None or after is None else after - before

    def agreement(self, number: int, name: str, kind: str = NEUTRAL) -> float | None:
        """The share of the cluster whose f or g changes as the concept changes it (see `sign_agreement`)."""
        change = self.change(number, name, kind)
        means = self.classes.f_mean if name == "f" else self.classes.g_mean
        if change is None or means is None:
            return None
        return sign_agreement(change, means[1] - means[0], self.vectors[number].strength.given > 0)


def matched_kl(curve: EffectCurve, gain: float | None) -> dict[str, float | None]:
    """KL and norm where the curve reaches `gain`; None if it does not."""
    at = None if gain is None else curve.damage_at(gain)
    return {"kl_matched": None if at is None else at[1], "norm_matched": None if at is None else at[0]}
