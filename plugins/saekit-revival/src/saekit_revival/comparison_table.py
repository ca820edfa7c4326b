"""The table of a comparison of methods: a row for each, over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from saekit import wilson_interval

HEADER = (
    "| method | dead | explained variance | L0 | revived | alive later | redrawn living | left alone |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


@dataclass(frozen=True)
class Row:
    """One training. alive: (latents alive later, of how many) of those revived, redrawn beside them, and left alone."""

    method: str
    dead: float
    explained_variance: float
    l0: float
    revived: int
    alive: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, method: str, summary: Mapping[str, Any], control: Mapping[str, Any] | None) -> Row:
        """From the summary of a training, and of the one in which living latents were redrawn."""
        found, metrics = summary["analysis"]["revivals"], summary["metrics"]
        beside = control["analysis"]["revivals"] if control else {}
        alive = {"revived": _counts(found, "revived"), "redrawn": _counts(beside, "redrawn"), "left": _counts(found, "left")}
        return cls(
            method, metrics["dead_fraction"], metrics["explained_variance"], metrics["l0"], int(found["revived"]), alive
        )


def _counts(found: Mapping[str, Any], kind: str) -> tuple[int, int]:
    n = int(found.get(f"{kind}_alive_share_n", 0))
    return round((found.get(f"{kind}_alive_share") or 0.0) * n), n


def table(rows: list[Row]) -> str:
    """In Markdown. Means with the lowest and the highest of the seeds; shares of latents with their 95% interval and number."""
    lines = [HEADER]
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        cells = [
            method,
            _range([row.dead for row in own], "{:.1%}".format),
            _range([row.explained_variance for row in own], "{:.4f}".format),
            _range([row.l0 for row in own], "{:.2f}".format),
            f"{statistics.mean(row.revived for row in own):.0f}",
            *(_share([row.alive[kind] for row in own]) for kind in ("revived", "redrawn", "left")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: list[float], shown: Callable[[float], str]) -> str:
    mean = shown(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({shown(min(values))} to {shown(max(values))})"


def _share(counts: list[tuple[int, int]]) -> str:
    alive, n = (sum(column) for column in zip(*counts, strict=True))
    if not n:
        return "none"
    low, high = wilson_interval(alive, n)
    return f"{alive / n:.0%} ({low:.0%} to {high:.0%}) of {n:,}"
