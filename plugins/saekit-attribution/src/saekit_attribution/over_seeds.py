"""The recipe `sycophancy` with several SAEs that differ in their seed alone, and the ranges of what `ablate` finds.

`python -m saekit_attribution.over_seeds --directory runs/over-seeds -o analyzer.ablate.samples=200`
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import saekit
from saekit import UsageError, write_json

SHARES = ("rate", "neutral", "kept")
SCALARS = (
    "enough", "latents", "tries", "rate_before", "rate_after", "neutral_after", "kept_after", "random_mean", "random_worst",
    "margin_before", "margin_after", "ce_rise", "kl",
)  # fmt: skip


def run_seeds(recipe: str, seeds: Iterable[int], directory: Path, overrides: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The `result.json` of `ablate` for each seed. A run that is finished already is read, not repeated.

    Weights differ by the seed; activations, which are harvested once into a cache, and their order do not."""
    changed = dict(_override(text) for text in overrides)
    found = {}
    for seed in seeds:
        place = directory / f"seed-{seed}"
        if not (place / "summary.json").is_file():
            shared = {"training.seed": seed, "training.data_seed": 0, "source.cache": str(directory / "cache")}
            saekit.run(recipe, overrides={**changed, **shared}, directory=place)
        found[seed] = json.loads((place / "analysis" / "ablate" / "result.json").read_text(encoding="utf-8"))
    return found


def curve_ranges(results: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """For each template type, ranking and number of latents the shares of all seeds: lowest, median, highest."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for result in results.values():
        for row in result["tables"].get("curve", []):
            groups.setdefault((row["template_type"], row["ranking"], row["latents"]), []).append(row)
    return [
        {
            "template_type": kind, "ranking": ranking, "latents": latents, "seeds": len(rows),
            **{name: _range([row[name] for row in rows]) for name in SHARES},
        }
        for (kind, ranking, latents), rows in groups.items()
    ]  # fmt: skip


def tested_ranges(results: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """For each scalar of `ablate` its values over the seeds, in their order, with lowest, median and highest."""
    names = dict.fromkeys(name for result in results.values() for name in result["scalars"])
    rows = []
    for name in (name for name in names if name.endswith(SCALARS)):
        values = [result["scalars"].get(name) for result in results.values()]
        rows.append({"scalar": name, "values": values, "range": _range(values)})
    return rows


def _range(values: Sequence[float | None]) -> list[float] | None:
    """The lowest, the median and the highest; None if there is no value."""
    known = [value for value in values if value is not None]
    return [min(known), statistics.median(known), max(known)] if known else None


def as_markdown(results: Mapping[int, dict[str, Any]]) -> str:
    """Two tables: the curve, with ranges over the seeds, and the test, with each seed's value."""
    lines = ["| type | ranking | latents | rate | neutral | kept |", "| --- | --- | --- | --- | --- | --- |"]
    for row in curve_ranges(results):
        shares = " | ".join(_told(row[name]) for name in SHARES)
        lines.append(f"| {row['template_type']} | `{row['ranking']}` | {row['latents']} | {shares} |")
    lines += ["", f"| test | {' | '.join(f'seed {seed}' for seed in results)} | range |", "| --- |" + " --- |" * (len(results) + 1)]
    for row in tested_ranges(results):
        lines.append(f"| {row['scalar']} | {' | '.join(map(_number, row['values']))} | {_told(row['range'])} |")
    return "\n".join(lines)


def _told(found: Sequence[float] | None) -> str:
    return "-" if found is None else f"{_number(found[1])} ({_number(found[0])} to {_number(found[2])})"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"-o {text}: write key=value, for example analyzer.ablate.samples=200.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the tables, and with --out write the figures to a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m saekit_attribution.over_seeds", description=__doc__)
    parser.add_argument("--recipe", default="sycophancy", help="a recipe or a run file with the analyzer ablate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--directory", required=True, help="where the runs and the activations' cache are")
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="key=value")
    parser.add_argument("--out", help="write the figures to this JSON file")
    options = parser.parse_args(arguments)
    try:
        results = run_seeds(options.recipe, options.seeds, Path(options.directory), options.overrides)
    except UsageError as error:
        parser.error(str(error))
    print(as_markdown(results))
    if options.out:
        found = {"curve": curve_ranges(results), "test": tested_ranges(results)}
        write_json(Path(options.out), {"seeds": options.seeds, "overrides": options.overrides, **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
