"""Which method of revival helps: ``python -m saekit_revival.comparison [RUN_FILE]``.

Every `[[variant]]` of the run file is a method, and each needs the callback `revivals`; without a run file it is the recipe
`dead_latents`.

1. With a seed that is not reported, the penalty (`--knob`) of every variant is changed until its L0 is `--l0`.
2. With these penalties, all variants are trained with each of the seeds that are reported.
3. They are trained again with living latents that get new weights beside the revived ones. That harms them, so only how many of
   these are alive later is taken from there.

The runs stay in `--directory`; the same command goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import saekit
from saekit import SaekitError, UsageError
from saekit_revival.comparison_table import Row, table

TUNING_SEED = 1000
CLOSE = 0.03
"""An L0 within this share of the wanted one is equal to it."""
STEEPEST = 4.0
"""The penalty changes by this factor at most from one training to the next."""
Summary = dict[str, Any]


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", nargs="?", default="dead_latents", help="a run file or a recipe with variants")
    parser.add_argument("--directory", type=Path, default=Path("runs/revival"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--l0", type=float, default=10.0, help="the L0 that all variants are tuned to")
    parser.add_argument("--knob", default="loss.l1.weight", help="the key that sets the L0; empty if the gate does")
    parser.add_argument("--tries", type=int, default=6, help="trainings for tuning at most")
    parser.add_argument("--control", type=int, default=32, help="living latents redrawn at most beside the revived; 0: skip")
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="key=value", help="as for `saekit run`")
    given = parser.parse_args()
    if given.seeds < 1 or given.tries < 1 or given.control < 0 or not given.l0 > 0:
        parser.error("--seeds and --tries must be at least 1, --control at least 0 and --l0 more than 0")
    wrong = [text for text in given.overrides if "=" not in text]
    if wrong:
        parser.error(f"-o {wrong[0]} has no value: write key=value")
    shared = {key: _value(text) for key, _, text in (text.partition("=") for text in given.overrides)}
    study = Study(given.run_file, given.directory, shared)
    try:
        weights = study.tuned(given.knob, given.l0, given.tries) if given.knob else {}
        print(table(study.rows(given.knob, weights, given.seeds, given.control)))
    except SaekitError as error:
        parser.exit(2, f"error: {error}\n")


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


class Study:
    """The runs of one comparison, one after another.

    shared: overrides of every run. say: told what has been trained."""

    def __init__(
        self, run_file: str, directory: Path, shared: Mapping[str, Any], say: Callable[[str], None] = print
    ) -> None:
        self.run_file, self.directory, self.shared, self.say = run_file, directory, shared, say

    def run(self, name: str, overrides: Mapping[str, Any]) -> dict[str, Summary]:
        """The summary of each variant of the run of this name, which is trained now if it is not there."""
        place = self.directory / name
        if not (place / "summary.json").is_file():
            saekit.run(self.run_file, overrides={**self.shared, **overrides}, directory=place)
        variants = json.loads((place / "summary.json").read_text(encoding="utf-8"))["variants"]
        for variant, summary in variants.items():
            if "revivals" not in summary["analysis"]:
                raise UsageError(
                    f"{self.run_file}: variant {variant!r} has no callback `revivals`, which counts what comes back. Add one."
                )
            measured = summary["metrics"]
            self.say(f"{name} {variant}: L0 {measured['l0']:.2f}, explained variance {measured['explained_variance']:.4f}")
        if not variants:
            raise UsageError(f"{self.run_file}: has no [[variant]], so there is nothing to compare. Add one for each method.")
        return variants

    def tuned(self, knob: str, wanted: float, tries: int) -> dict[str, Any]:
        """The value of the knob with which each variant has the wanted L0, by secants of log L0 over log weight."""
        seen: dict[str, list[tuple[float, float]]] = {}  # of each variant: (log weight, log L0)
        found: dict[str, Any] = {}
        for number in range(tries):
            variants = self.run(f"tune-{number}", {"training.seed": TUNING_SEED, **overrides_of(knob, found)})
            off = []
            for name, summary in variants.items():
                found.setdefault(name, self._first(number, name, knob))
                l0 = summary["metrics"]["l0"]
                seen.setdefault(name, []).append((math.log(top_of(found[name])), math.log(max(l0, 1e-3))))
                if abs(l0 / wanted - 1) > CLOSE:
                    off.append(name)
            if not off:
                return found
            if number + 1 < tries:
                for name in off:
                    found[name] = with_top(found[name], math.exp(next_guess(seen[name], math.log(wanted))))
        self.say(f"After {tries} trainings the L0 of {', '.join(off)} is still not within {CLOSE:.0%} of {wanted:g}.")
        return found

    def _first(self, number: int, variant: str, knob: str) -> Any:
        """The knob's value in the run file, from what the run has resolved of it."""
        file = self.directory / f"tune-{number}" / "variants" / variant / "run.toml"
        section, _, rest = knob.partition(".")
        name, _, key = rest.partition(".")
        for entry in tomllib.loads(file.read_text(encoding="utf-8")).get(section, []):
            if name in (entry.get("name"), entry["use"]) and key in entry:
                return entry[key]
        raise UsageError(f"--knob {knob}: variant {variant!r} has no such key. Name a loss's weight, as in loss.l1.weight.")

    def rows(self, knob: str, values: Mapping[str, Any], seeds: int, control: int) -> list[Row]:
        """One row for each method and seed."""
        rows = []
        for seed in range(seeds):
            overrides = {"training.seed": seed, **overrides_of(knob, values)}
            clean = self.run(f"seed-{seed}", overrides)
            asked = {f"variant.{name}.callback.revivals.control": control for name in clean}
            redrawn = self.run(f"seed-{seed}-control", {**overrides, **asked}) if control else {}
            rows += [Row.of(name, summary, redrawn.get(name)) for name, summary in clean.items()]
        return rows


def overrides_of(knob: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The knob of each variant as overrides of a run."""
    return {f"variant.{name}.{knob}": value for name, value in values.items()}


def top_of(value: Any) -> float:
    """The number that a weight comes to: its own, or `to` of its schedule."""
    return float(value["to"] if isinstance(value, Mapping) else value)


def with_top(value: Any, number: float) -> Any:
    """The weight with another such number."""
    return {**value, "to": number} if isinstance(value, Mapping) else number


def next_guess(seen: list[tuple[float, float]], wanted: float) -> float:
    """The next log weight: along the line through the two points nearest to the wanted log L0, at most a factor `STEEPEST` from
    the nearer. Through one point, and where the line does not fall, its slope is taken as -1."""
    near = sorted(seen, key=lambda point: abs(point[1] - wanted))[:2]
    (x, y), slope = near[0], -1.0
    if len(near) == 2 and near[0][0] != near[1][0]:
        slope = min((near[0][1] - near[1][1]) / (near[0][0] - near[1][0]), 0.0) or -1.0
    return x + min(max((wanted - y) / slope, -math.log(STEEPEST)), math.log(STEEPEST))


if __name__ == "__main__":
    main()
