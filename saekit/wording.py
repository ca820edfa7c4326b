"""Numbers, durations and names as people read them, for the report and the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NOT_DEFINED = "not defined"

ABBREVIATIONS = {"AUROC", "CE", "FVU", "KL", "L0", "L1", "MSE", "SAE"}
LOGGED = {
    "dead": "dead latents",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
}
"""Logged values whose key alone does not name them for a reader."""


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, which can be drawn and sorted by."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond a double
        return False


def label(key: str) -> str:
    """A key as people write it: `ce_recovered` is "CE recovered"."""
    head, slash, rest = key.partition("/")
    words = LOGGED.get(head) or " ".join(w.upper() if w.upper() in ABBREVIATIONS else w for w in head.split("_"))
    return words + (f" {slash} {rest.replace('_', ' ')}" if slash else "")


def is_constant(values: Sequence[float]) -> bool:
    """Whether the finite values are equal but for rounding."""
    return max(values) - min(values) <= 1e-9 * max(abs(max(values)), abs(min(values)))


def number(value: Any) -> str:
    """A value with three or four significant digits. None is put in words: an undefined score is not a zero."""
    if value is None:
        return NOT_DEFINED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value.is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    if abs(value) >= 1e6 or abs(value) < 0.1:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def interval(ends: Any) -> str:
    """A confidence interval: 0.38 to 0.96. Empty for anything but two numbers."""
    if not isinstance(ends, (list, tuple)) or len(ends) != 2 or not all(map(is_number, ends)):
        return ""
    return " to ".join(f"{end:,.0f}" if abs(end) >= 1000 else f"{end:.3g}" for end in ends)


def with_intervals(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Each value with its name and what stands beside it: an interval, " (0.05 to 0.26, n 50)", or nothing.

    The interval is NAME_low to NAME_high, and n is NAME_n; these are not told apart then."""
    intervals = {name for name in values if f"{name}_low" in values and f"{name}_high" in values}
    for name, value in values.items():
        stem, _, end = name.rpartition("_")
        if end in ("low", "high", "n") and stem in intervals:
            continue
        low, high, n = (values.get(f"{name}_{end}") for end in ("low", "high", "n"))
        if name not in intervals or low is None or high is None:
            yield name, value, ""
        else:
            yield name, value, f" ({number(low)} to {number(high)}" + (")" if n is None else f", n {number(n)})")


def count(value: float) -> str:
    """A count in at most six characters: 4,096, 62.3k, 1.25M, 3.00B."""
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,960 would become 1000.0k: it is written in the next size.
        if abs(value) >= size * 0.9995 or suffix == "k":
            scaled = value / size
            return f"{scaled:.2f}{suffix}" if abs(scaled) < 9.995 else f"{scaled:.1f}{suffix}"
    raise AssertionError("unreachable")


def held_out_amounts(counts: dict[str, Any]) -> list[tuple[list[str], str]]:
    """How much held-out data metrics saw, "20.0k tokens of 412 documents", with the names of those that saw as much.

    counts: of each metric by its name, as `summary.json` has them. Entries that are not numbers are left out."""
    groups: dict[str, list[str]] = {}
    for name, given in counts.items() if isinstance(counts, dict) else ():
        of = {unit: n for unit, n in given.items() if is_number(n)} if isinstance(given, dict) else {}
        told = next((unit for unit in ("documents", "sequences") if of.get(unit) not in (None, of.get("tokens"))), None)
        amount = f"{count(of.get('tokens') or 0)} {'tokens' if told else 'rows'}"
        groups.setdefault(f"{amount} of {count(of[told])} {told}" if told else amount, []).append(name)
    return [(names, amount) for amount, names in groups.items()]


def duration(seconds: float) -> str:
    """0.8 s, 42 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(size: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def percent(fraction: float) -> str:
    """62 %. Only all of it is 100 %: nothing less is rounded up to that."""
    return f"{min(int(fraction * 100 + 0.5), 100 if fraction >= 1 else 99)} %"


UNSAFE = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
"""A regular expression for what must not reach a terminal: control characters except newline and tab, what changes the
direction of writing or ends a line unseen, halves of surrogate pairs."""


def clean_lines(text: Any) -> str:
    """Text in which what would control a terminal is a replacement character; lines and tabs are kept."""
    return re.sub(UNSAFE, "\N{REPLACEMENT CHARACTER}", str(text).replace("\r\n", "\n"))


def clean(text: Any) -> str:
    """Text on one line, of printable characters alone: names, warnings and tokens in a table or a line of their own."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
