"""The experiment's results as tables: what each arm reaches, and paired differences over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from saekit import Interval
from saekit_quality.metrics import share_of_ceiling

ARMS = ("hard", "soft", "hard_contrast", "soft_contrast", "hard_shuffled", "soft_shuffled")
WORDS = {
    "hard": "BCE hard", "soft": "BCE soft", "hard_contrast": "hard + contrast", "soft_contrast": "soft + contrast",
    "hard_shuffled": "hard + shuffled pairs", "soft_shuffled": "soft + shuffled pairs",
}  # fmt: skip
PAIRS = (
    ("soft", "hard"), ("hard_contrast", "hard"), ("hard_contrast", "hard_shuffled"),
    ("soft_contrast", "soft"), ("soft_contrast", "soft_shuffled"),
)  # fmt: skip
"""Which arm is compared with which."""


def paired(differences: Sequence[float]) -> tuple[float, Interval]:
    """The mean of differences of independent pairs, with its 95% interval by Student's t. At least two are needed."""
    from scipy.stats import t  # slow to import

    values = np.asarray(differences, dtype=np.float64)
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    reach = float(t.ppf(0.975, len(values) - 1)) * error
    return mean, Interval(mean - reach, mean + reach)


def as_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Three tables: macro AUROC with the share of the ceiling, ECE, and paired differences. `*` marks an interval without 0."""
    cells = sorted({(entry["noise"], entry["labels"]) for entry in results})
    seeds = len({entry["seed"] for entry in results})
    lines = [f"Macro AUROC on test responses, mean of {seeds} seeds (share of the ceiling's lead over chance)", ""]
    lines += _head("ceiling", *map(WORDS.__getitem__, ARMS))
    for cell in cells:
        top = _values(results, cell, "ceiling", "auroc")
        told = []
        for arm in ARMS:
            values = _values(results, cell, arm, "auroc")
            shares = [share_of_ceiling(value, best) for value, best in zip(values, top, strict=True)]
            known = [share for share in shares if share is not None]
            told.append(f"{np.mean(values):.3f} ({np.mean(known):.0%})" if known else f"{np.mean(values):.3f}")
        lines.append(_row(cell, f"{np.mean(top):.3f}", *told))
    lines += ["", "Macro ECE (after temperature scaling on validation responses)", ""]
    lines += _head("ceiling", *map(WORDS.__getitem__, ARMS))
    for cell in cells:
        both = [[np.mean(_values(results, cell, arm, name)) for name in ("ece", "scaled_ece")] for arm in ARMS]
        top = _values(results, cell, "ceiling", "ece")
        lines.append(_row(cell, f"{np.mean(top):.3f}", *(f"{a:.3f} ({b:.3f})" for a, b in both)))
    for name, words in (("auroc", "macro AUROC"), ("ece", "macro ECE"), ("scaled_ece", "macro ECE after temperature scaling")):
        lines += ["", f"Paired differences of {words}, with 95% intervals over seeds", ""]
        lines += _head(*(f"{WORDS[a]}, less {WORDS[b]}" for a, b in PAIRS))
        for cell in cells:
            lines.append(_row(cell, *(_difference(results, cell, a, b, name) for a, b in PAIRS)))
    return "\n".join(lines)


def _values(results: Sequence[dict[str, Any]], cell: tuple[float, int], arm: str, name: str) -> list[float]:
    """One value a seed, in the order of the seeds."""
    found = {entry["seed"]: entry["arms"][arm][name] for entry in results if (entry["noise"], entry["labels"]) == cell}
    return [found[seed] for seed in sorted(found)]


def _difference(results: Sequence[dict[str, Any]], cell: tuple[float, int], arm: str, other: str, name: str) -> str:
    both = zip(_values(results, cell, arm, name), _values(results, cell, other, name), strict=True)
    mean, (low, high) = paired([a - b for a, b in both])
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f}){'' if low <= 0 <= high else '*'}"


def _head(*columns: str) -> list[str]:
    return [f"| noise | labels | {' | '.join(columns)} |", "| --- | --- |" + " --- |" * len(columns)]


def _row(cell: tuple[float, int], *columns: str) -> str:
    return f"| {cell[0]} | {cell[1]} | {' | '.join(columns)} |"
