"""The result of `steer`: the latent's scalars, those of the controls, and notes on what they do not show."""

from __future__ import annotations

from saekit import AgainstControls, Result
from saekit_steering.continuations import mean_scores
from saekit_steering.effect_curve import mean
from saekit_steering.figures import damage_figure, effect_figure
from saekit_steering.measurements import Curves, Measurements, matched_kl
from saekit_steering.prompts import NEUTRAL, UNRELATED
from saekit_steering.steering_vectors import KINDS
from saekit_steering.tables import cluster_table, control_table, examples, sweep_table

CONTROLS = tuple(kind for kind in KINDS if kind != "latent")
HEADLINE = [
    "gain", "monotone", "random_gain_max", "random_covariance_gain_max", "other_latent_gain_max", "kl_matched", "random_kl_matched",
    "delta_f_latent", "delta_f_neighbours", "delta_f_right", "delta_g_right",
]  # fmt: skip


def summarise(found: Measurements) -> Result:
    """The analyzer's result, without its files."""
    curves = found.curves()
    result = Result(notes=beside_controls(found, curves))
    result.scalars = scalars(found, curves, result.notes)
    result.tables = {
        "sweep": sweep_table(found),
        "controls": control_table(found, curves),
        "cluster": cluster_table(found),
        "texts": mean_scores(found.written, found.vectors),
        "examples_of_texts": examples(found),
    }
    result.headline = [name for name in HEADLINE if name in result.scalars]
    result.figures = {"effect": effect_figure(curves, NEUTRAL), "damage": damage_figure(curves, UNRELATED)}
    return result


def beside_controls(found: Measurements, curves: Curves) -> list[str]:
    """Sentences that say whether the gain, the damage at equal effect and the cluster's changes exceed their controls."""
    if not found.settings.controls:
        return ["Nothing was measured beside the latent (controls = 0), so nothing says whether any other direction does as well."]
    own, gain = curves["latent", 0], found.gain_to_match(curves["latent", 0])
    gains, damages = [], []
    for kind in CONTROLS:
        some = [curve for (k, _), curve in curves.items() if k == kind]
        gains.append(AgainstControls.of(own.largest, (c.at_norms_of(own).largest for c in some)).sentence("gain", KINDS[kind]))
        damage = [matched_kl(c, gain)["kl_matched"] for c in (own, *some)]
        if damage[0] is not None and any(one is not None for one in damage[1:]):
            beside = AgainstControls.of(damage[0], damage[1:], higher=False)
            damages.append(beside.sentence(f"KL divergence at a gain of {gain:.3g}", f"{KINDS[kind]} that reach this gain"))
    shares = []
    for name in ("f", "g"):
        right = _right(found, name)
        if right["latent"]:
            beside = AgainstControls.of(mean(right["latent"]), right["random"])
            shares.append(beside.sentence(f"delta_{name}_right", KINDS["random"]))
    return [*gains, *damages, *shares]


def _right(found: Measurements, name: str) -> dict[str, list[float]]:
    """By kind of direction: the share of the cluster whose f or g changes, at the largest strength, as with the concept."""
    end = _end(found)
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number, vector in enumerate(found.vectors):
        if vector.strength.given == end and (share := found.agreement(number, name)) is not None:
            shares[vector.kind].append(share)
    return shares


def _end(found: Measurements) -> float:
    """The largest strength in the direction of the sweep."""
    given = [vector.strength.given for vector in found.vectors if vector.kind == "latent"]
    return max(given) if max(given) >= 0 else min(given)


def scalars(found: Measurements, curves: Curves, notes: list[str]) -> dict[str, float | int | None]:
    """The latent's scalars with those of the controls.

    gain: the largest change of the concept's log-odds on neutral prompts. monotone: 1 if it rises with every strength;
    for controls the share of directions. kl_matched: KL on unrelated prompts where the gain is `matched_gain`; for controls
    the mean over those that reach it, and `reached` is their share. delta_f_right, delta_g_right: the share of the cluster
    whose pooled change at the largest strength has the concept's sign; delta_f_latent and delta_f_neighbours: how large
    the change is, for the latent and on average for its neighbours."""
    own = curves["latent", 0]
    gain = found.gain_to_match(own)
    values: dict[str, float | int | None] = {"gain": own.largest, "monotone": int(own.monotone), "matched_gain": gain}
    values |= matched_kl(own, gain)
    for kind in CONTROLS:
        some = [curve for (k, _), curve in curves.items() if k == kind]
        word = kind.replace(" ", "_")
        reached = [at[1] for c in some if gain and (at := c.damage_at(gain)) is not None]
        within = [c.at_norms_of(own) for c in some]
        values |= {
            f"{word}_gain_mean": mean([c.largest for c in within]),
            f"{word}_gain_max": max((c.largest for c in within), default=None),
            f"{word}_monotone": mean([float(c.monotone) for c in within]),
            f"{word}_reached": mean([float(gain is not None and c.damage_at(gain) is not None) for c in some]),
            f"{word}_kl_matched": mean(reached),
        }
        if some and not reached:
            notes.append(
                f"None of {len(some)} control directions ({kind}) reaches the gain at which KL is compared, at up to "
                f"{max(abs(n) for c in some for n in c.norms) / max(map(abs, own.norms)):g} times the largest strength."
            )
    if own.largest <= 0:
        notes.append(
            f"Steering by latent {found.settings.latent} never raised the log-odds of {found.concept!r} on neutral prompts, "
            "so there is no effect at which to compare KL."
        )
    values |= _changes(found, notes)
    return values


def _changes(found: Measurements, notes: list[str]) -> dict[str, float | int | None]:
    """How the cluster changes at the largest strength, for the latent and for random directions."""
    end = _end(found)
    values: dict[str, float | int | None] = {}
    for name in ("f", "g"):
        shares = _right(found, name)
        values[f"delta_{name}_right"] = mean(shares["latent"])
        values[f"random_delta_{name}_right"] = mean(shares["random"])
        at_end = (n for n, v in enumerate(found.vectors) if v.kind == "latent" and v.strength.given == end)
        change = found.change(next(at_end), name)
        values[f"delta_{name}_latent"] = None if change is None else float(change[0])
        values[f"delta_{name}_neighbours"] = float(change[1:].mean()) if change is not None and len(change) > 1 else None
    if found.cluster.graph is None:
        notes.append("There is no feature graph, so the cluster is the latent alone and g was not read. Add [graph].")
    elif len(found.cluster.latents) == 1:
        notes.append(
            f"Latent {found.settings.latent} has no neighbours in the feature graph, so the cluster is the latent alone."
        )
    values["cluster_size"] = len(found.cluster.latents)
    values["std_of_latent"] = float(found.statistics.std[found.settings.latent])
    return values
