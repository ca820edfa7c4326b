"""From what was measured to the analyzer's result: scalars, tables, figures, and what a reader must be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saekit import Result
from saekit_steering.activation_statistics import Spread
from saekit_steering.cluster import Classes, Cluster, class_table, right_share
from saekit_steering.continuations import Continuation, averaged
from saekit_steering.effect_curve import Curve, mean
from saekit_steering.figures import damage_figure, effect_figure
from saekit_steering.prompts import NEUTRAL, UNRELATED
from saekit_steering.scoring import Measured
from saekit_steering.steering_vectors import Push

if TYPE_CHECKING:
    from saekit_steering.steer import Steer

KINDS = ("latent", "random", "other latent")
EXAMPLES = 40
HEADLINE = [
    "gain", "monotone", "random_gain_max", "kl_matched", "random_kl_matched",
    "delta_f_latent", "delta_f_neighbours", "delta_f_right", "delta_g_right",
]  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Everything that was measured."""

    settings: Steer
    kinds: list[str]
    concept: str
    cluster: Cluster
    classes: Classes
    spread: Spread
    pushes: list[Push]
    measured: Measured
    written: list[Continuation]


def summarised(found: Found) -> Result:
    curves = curves_of(found)
    result = Result()
    result.scalars = scalars(found, curves, result.notes)
    result.tables = {
        "sweep": sweep_table(found),
        "controls": control_table(found, curves),
        "cluster": cluster_table(found),
        "texts": averaged(found.written, found.pushes),
        "examples_of_texts": _examples(found),
    }
    result.headline = [name for name in HEADLINE if name in result.scalars]
    result.figures = {"effect": effect_figure(curves, NEUTRAL), "damage": damage_figure(curves, UNRELATED)}
    return result


def curves_of(found: Found) -> dict[tuple[str, int], Curve]:
    """By kind of push and its number: effect on neutral prompts, damage on unrelated ones, over the strengths."""
    groups: dict[tuple[str, int], list[int]] = {}
    for number, push in enumerate(found.pushes):
        groups.setdefault((push.kind, push.number), []).append(number)
    clean = found.measured.clean[NEUTRAL].mean("log_odds")
    curves = {}
    for key, numbers in groups.items():
        numbers.sort(key=lambda n: found.pushes[n].strength.given)
        strengths = [found.pushes[n].strength for n in numbers]
        scores = [found.measured.pushed[n] for n in numbers]
        curves[key] = Curve(
            [s.norm if s.given > 0 else -s.norm for s in strengths],
            [s[NEUTRAL].mean("log_odds") - clean for s in scores],
            [s[UNRELATED].mean("kl") for s in scores],
        )
    return curves


def scalars(found: Found, curves: dict[tuple[str, int], Curve], notes: list[str]) -> dict[str, float | int | None]:
    """The latent's figures, each with that of the controls beside it.

    gain: the largest change of the concept's log-odds on neutral prompts. monotone: 1 where it rises with every strength;
    for controls the share of directions. kl_matched: KL on unrelated prompts where the gain is `matched_gain`; for controls
    the mean of those that reach it, `reached` being their share. delta_f_right, delta_g_right: of the cluster, the share
    whose pooled change at the largest strength is not zero and goes as the concept does; delta_f_latent and
    delta_f_neighbours say how large it is, for the latent and on average for its neighbours."""
    own = curves["latent", 0]
    target = found.settings.effect or (own.largest / 2 if own.largest > 0 else None)
    values: dict[str, float | int | None] = {"gain": own.largest, "monotone": int(own.monotone), "matched_gain": target}
    values |= _matched(own, target)
    for kind in KINDS[1:]:
        some = [curve for (k, _), curve in curves.items() if k == kind]
        word = kind.replace(" ", "_")
        reached = [at[1] for c in some if target and (at := c.damage_at(target)) is not None]
        within = [_within(c, own) for c in some]
        values |= {
            f"{word}_gain_mean": mean([c.largest for c in within]),
            f"{word}_gain_max": max((c.largest for c in within), default=None),
            f"{word}_monotone": mean([float(c.monotone) for c in within]),
            f"{word}_reached": mean([float(target is not None and c.damage_at(target) is not None) for c in some]),
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


def _matched(curve: Curve, target: float | None) -> dict[str, float | None]:
    at = None if target is None else curve.damage_at(target)
    return {"kl_matched": None if at is None else at[1], "norm_matched": None if at is None else at[0]}


def _within(curve: Curve, own: Curve) -> Curve:
    """A control's curve at the strengths of the latent alone."""
    keep = [i for i, n in enumerate(curve.norms) if any(abs(n - m) <= 1e-6 * abs(m) for m in own.norms)]
    return Curve(*([values[i] for i in keep] for values in (curve.norms, curve.effects, curve.damages)))


def _changes(found: Found, notes: list[str]) -> dict[str, float | int | None]:
    """How much of the cluster changes as the concept does, for the latent and for random directions."""
    end = max(p.strength.given for p in found.pushes if p.kind == "latent")
    if end < 0:
        end = min(p.strength.given for p in found.pushes if p.kind == "latent")
    values: dict[str, float | int | None] = {}
    for name in ("f", "g"):
        shares = {kind: [] for kind in ("latent", "random")}  # type: dict[str, list[float]]
        for number, push in enumerate(found.pushes):
            if push.kind in shares and push.strength.given == end:
                share = _right(found, number, name)
                if share is not None:
                    shares[push.kind].append(share)
        values[f"delta_{name}_right"] = mean(shares["latent"])
        values[f"random_delta_{name}_right"] = mean(shares["random"])
        changes = [
            _change(found, n, name)
            for n, p in enumerate(found.pushes)
            if p.kind == "latent" and p.strength.given == end
        ]
        change = changes[0]
        values[f"delta_{name}_latent"] = None if change is None else float(change[0])
        alone = change is None or len(change) < 2
        values[f"delta_{name}_neighbours"] = None if alone else float(change[1:].mean())
    if found.cluster.graph is None:
        notes.append("There is no feature graph, so the cluster is the latent alone and g was not read. Add [graph].")
    elif len(found.cluster.latents) == 1:
        notes.append(
            f"Latent {found.settings.latent} has no neighbours in the feature graph: its cluster is itself alone."
        )
    values["cluster_size"] = len(found.cluster.latents)
    values["std_of_latent"] = float(found.spread.std[found.settings.latent])
    return values


def _right(found: Found, number: int, name: str, kind: str = NEUTRAL) -> float | None:
    change = _change(found, number, name, kind)
    means = found.classes.f_mean if name == "f" else found.classes.g_mean
    if change is None or means is None:
        return None
    return right_share(change, means[1] - means[0], found.pushes[number].strength.given > 0)


def _change(found: Found, number: int, name: str, kind: str = NEUTRAL) -> Any:
    """The pooled change of f or g on prompts of a kind: [m], None where it was not read."""
    before, after = (s[kind].pooled(name) for s in (found.measured.clean, found.measured.pushed[number]))
    return None if before is None or after is None else after - before


def sweep_table(found: Found) -> list[dict[str, Any]]:
    """A row for every kind of prompts and strength of the latent, strength 0 first."""
    rows = []
    latent = found.settings.latent
    largest, rms = float(found.spread.largest[latent]), float(found.spread.rms[latent])
    for kind in _kinds(found):
        clean = found.measured.clean[kind]
        rows.append({"kind": kind, "strength": 0.0, "absolute": 0.0, "log_odds": clean.mean("log_odds"),
                     "probability": clean.mean("probability"), "kl": 0.0})  # fmt: skip
        for number, push in enumerate(found.pushes):
            if push.kind != "latent":
                continue
            score, strength = found.measured.pushed[number][kind], push.strength
            rows.append(
                {
                    "kind": kind,
                    "strength": strength.given,
                    "absolute": strength.absolute,
                    "of_max": strength.absolute / largest if largest else None,
                    "of_rms": strength.absolute / rms if rms else None,
                    "of_norm": strength.norm / found.spread.norm,
                    "log_odds": score.mean("log_odds"),
                    "gain": score.mean("log_odds") - clean.mean("log_odds"),
                    "probability": score.mean("probability"),
                    "kl": score.mean("kl"),
                    "output_score": score.output_score,
                    "delta_f_right": _right(found, number, "f", kind),
                    "delta_g_right": _right(found, number, "g", kind),
                }
            )
    return rows


def _kinds(found: Found) -> list[str]:
    """The kinds in the order of the prompts' file, what is no prompt last."""
    return list(dict.fromkeys([*found.kinds, *found.measured.clean]))


def control_table(found: Found, curves: dict[tuple[str, int], Curve]) -> list[dict[str, Any]]:
    """A row for every direction: its largest gain at the latent's own strengths, and KL where it has the matched gain."""
    own = curves["latent", 0]
    target = found.settings.effect or (own.largest / 2 if own.largest > 0 else None)
    rows = []
    for (kind, number), curve in curves.items():
        within = _within(curve, own)
        ends = [s for n, s in _scores_of(found, kind, number) if n == max(own.norms, key=abs)]
        rows.append(
            {
                "direction": kind,
                "number": found.settings.latent if kind == "latent" else number,
                "gain": within.largest,
                "monotone": within.monotone,
                "kl_at_largest_strength": within.damages[-1] if within.damages else None,
                "output_score": ends[0][NEUTRAL].output_score if ends else None,
                "gain_reached": curve.largest,
                **_matched(curve, target),
            }
        )
    return rows


def _scores_of(found: Found, kind: str, number: int) -> list[tuple[float, Any]]:
    return [
        (push.strength.norm if push.strength.given > 0 else -push.strength.norm, found.measured.pushed[at])
        for at, push in enumerate(found.pushes)
        if (push.kind, push.number) == (kind, number)
    ]


def cluster_table(found: Found) -> list[dict[str, Any]]:
    """A row for each latent of the cluster: means and standard deviations by class, and the changes on neutral prompts."""
    rows = class_table(found.cluster, found.classes)
    for number, push in enumerate(found.pushes):
        if push.kind != "latent":
            continue
        for name in ("f", "g"):
            change = _change(found, number, name)
            if change is not None:
                for row, value in zip(rows, change.tolist(), strict=True):
                    row[f"delta_{name} at {push.strength.given:g}"] = value
    return rows


def _examples(found: Found) -> list[dict[str, Any]]:
    """Texts as they were written, the greedy ones, at most `EXAMPLES`."""
    rows = [
        {
            "kind": one.prompt.kind,
            "strength": found.pushes[one.push].strength.given,
            "prompt": one.prompt.text,
            "without": one.pair.before,
            "with": one.pair.after,
        }
        for one in found.written
        if one.sampling == "greedy"
    ]
    return rows[:EXAMPLES]
