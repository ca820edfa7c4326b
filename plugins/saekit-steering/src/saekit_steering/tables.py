"""The tables of the result: the sweep, the controls, the cluster and examples of text."""

from __future__ import annotations

from typing import Any

from saekit_steering.cluster import class_table
from saekit_steering.measurements import Curves, Measurements, matched_kl
from saekit_steering.prompts import NEUTRAL

EXAMPLES = 40


def sweep_table(found: Measurements) -> list[dict[str, Any]]:
    """A row for every kind of prompt and strength of the latent, strength 0 first."""
    rows = []
    latent = found.settings.latent
    largest, rms = float(found.statistics.largest[latent]), float(found.statistics.rms[latent])
    for kind in _kinds(found):
        unsteered = found.scored.unsteered[kind]
        rows.append({"kind": kind, "strength": 0.0, "absolute": 0.0, "log_odds": unsteered.mean("log_odds"),
                     "probability": unsteered.mean("probability"), "kl": 0.0})  # fmt: skip
        for number, vector in enumerate(found.vectors):
            if vector.kind != "latent":
                continue
            score, strength = found.scored.steered[number][kind], vector.strength
            rows.append(
                {
                    "kind": kind,
                    "strength": strength.given,
                    "absolute": strength.absolute,
                    "of_max": strength.absolute / largest if largest else None,
                    "of_rms": strength.absolute / rms if rms else None,
                    "of_norm": strength.norm / found.statistics.norm,
                    "log_odds": score.mean("log_odds"),
                    "gain": score.mean("log_odds") - unsteered.mean("log_odds"),
                    "probability": score.mean("probability"),
                    "kl": score.mean("kl"),
                    "output_score": score.output_score,
                    "delta_f_right": found.agreement(number, "f", kind),
                    "delta_g_right": found.agreement(number, "g", kind),
                }
            )
    return rows


def _kinds(found: Measurements) -> list[str]:
    """The kinds in the order of the prompt file, held-out text last."""
    return list(dict.fromkeys([*found.kinds, *found.scored.unsteered]))


def control_table(found: Measurements, curves: Curves) -> list[dict[str, Any]]:
    """A row for every direction: its largest gain at the latent's strengths, and KL where it reaches the matched gain."""
    own = curves["latent", 0]
    largest, gain = max(own.norms, key=abs), found.gain_to_match(own)
    rows = []
    for (kind, number), curve in curves.items():
        within = curve.at_norms_of(own)
        ends = [
            found.scored.steered[at]
            for at, vector in enumerate(found.vectors)
            if (vector.kind, vector.number) == (kind, number) and vector.strength.signed_norm == largest
        ]
        rows.append(
            {
                "direction": kind,
                "number": found.settings.latent if kind == "latent" else number,
                "gain": within.largest,
                "monotone": within.monotone,
                "kl_at_largest_strength": within.damages[-1] if within.damages else None,
                "output_score": ends[0][NEUTRAL].output_score if ends else None,
                "gain_reached": curve.largest,
                **matched_kl(curve, gain),
            }
        )
    return rows


def cluster_table(found: Measurements) -> list[dict[str, Any]]:
    """A row for each latent of the cluster: mean and standard deviation by class, and the changes on neutral prompts."""
    rows = class_table(found.cluster, found.classes)
    for number, vector in enumerate(found.vectors):
        if vector.kind != "latent":
            continue
        for name in ("f", "g"):
            change = found.change(number, name)
            if change is not None:
                for row, value in zip(rows, change.tolist(), strict=True):
                    row[f"delta_{name} at {vector.strength.given:g}"] = value
    return rows


def examples(found: Measurements) -> list[dict[str, Any]]:
    """The greedy continuations, at most `EXAMPLES` of them."""
    rows = [
        {
            "kind": one.prompt.kind,
            "strength": found.vectors[one.vector].strength.given,
            "prompt": one.prompt.text,
            "without": one.pair.before,
            "with": one.pair.after,
        }
        for one in found.written
        if one.sampling == "greedy"
    ]
    return rows[:EXAMPLES]
