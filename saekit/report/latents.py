"""Tables of examples as the page shows them: by latent, what it fires on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from saekit.examples import Example, Tokens, as_html, example_of
from saekit.wording import is_number, label, number, percent

if TYPE_CHECKING:
    from markupsafe import Markup

LATENTS = 200
"""How many latents the page shows. It says that all of them are in result.json."""


@dataclass
class Latent:
    """A latent and what it fires on: its activation there, in words, and the example."""

    latent: str
    facts: list[tuple[str, str]]
    examples: list[tuple[str, Markup]] = field(default_factory=list)


def of_rows(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Example]] | None:
    """Each row of a table of examples, with its example; None if the table is another one, or damaged."""
    if not all(row.keys() >= {"latent", "activation"} for row in rows):
        return None
    try:
        return [(row, example_of(row["example"]) if "example" in row else _of_tokens(row)) for row in rows]
    except (ValueError, KeyError):
        return None


def by_latent(
    rows: list[tuple[dict[str, Any], Example]], about: list[dict[str, Any]], analyzer: str
) -> tuple[list[Latent], str]:
    """The examples by latent, in their order, and a note on what is left out. about: rows of facts on the latents."""
    from markupsafe import Markup

    facts = {_name(row["latent"]): row for row in about if "latent" in row}
    groups: dict[str, list[tuple[dict[str, Any], Example]]] = {}
    for row, example in rows:
        groups.setdefault(_name(row["latent"]), []).append((row, example))
    latents = []
    for name, group in list(groups.items())[:LATENTS]:
        group = sorted(group, key=lambda of: of[0]["rank"] if is_number(of[0].get("rank")) else math.inf)
        strongest = max((value for row, example in group for value in _activations(row, example)), default=0.0)
        about_it = [(label(str(k)), _value(v)) for k, v in facts.get(name, {}).items() if k not in ("latent", "example")]
        shown = [(_place(row), Markup(as_html(example, strongest))) for row, example in group]
        latents.append(Latent(name, about_it, shown))
    note = ""
    if len(groups) > LATENTS:
        note = f"The first {LATENTS} of {len(groups):,} latents; all of them are in analysis/{analyzer}/result.json."
    return latents, note


def _place(row: dict[str, Any]) -> str:
    """The activation, and which quantile it is of the latent's activations if the row tells."""
    quantile = f" ({percent(row['quantile'])})" if is_number(row.get("quantile")) else ""
    return number(row["activation"]) + quantile


def _activations(row: dict[str, Any], example: Example) -> list[float]:
    shown = (example.activations or ()) if isinstance(example, Tokens) else ()
    return [value for value in (*shown, row["activation"]) if is_number(value)]


def _of_tokens(row: dict[str, Any]) -> Example:
    """A row as it was written before there were examples: `token` with `before` and `after`, or `tokens` and `activations`."""
    parts, activations = row.get("tokens"), row.get("activations")
    if isinstance(parts, list) and isinstance(activations, list) and parts and len(parts) == len(activations):
        known = [value if is_number(value) else None for value in activations]
        finite = [value for value in known if value is not None]
        return Tokens(parts=[*map(str, parts)], activations=known, at=known.index(max(finite)) if finite else None)
    around = (str(row.get("before") or ""), str(row["token"]), str(row.get("after") or ""))
    return Tokens(parts=around, at=1, activations=(None, row["activation"], None))


def _name(latent: Any) -> str:
    return str(latent) if isinstance(latent, int) else _value(latent)


def _value(value: Any) -> str:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else number(value)
