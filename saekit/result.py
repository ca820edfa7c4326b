"""`Result`: what an analyzer gives back, and how it stands on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """The answer of an analyzer.

    scalars: named plain numbers, shown in the summary; None where a value is not defined.
    tables: named lists of rows, each row a dictionary of plain values. Rows that have `latent`, `activation` and
    `token` (with `before` and `after`, or `tokens` and `activations`) are shown as text with the token highlighted.
    figures: named plotly figures, as the dictionary of `figure.to_plotly_json()`.
    files: paths relative to the analyzer's directory of what it wrote there itself.
    headline: names of those scalars that `saekit compare` shows without being asked.
    notes: sentences that a reader of the figures must know (a null result and its reason, a low fidelity).
    """

    scalars: dict[str, float | int | None] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    headline: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The content of `result.json`."""
        return {
            "scalars": self.scalars,
            "tables": self.tables,
            "figures": self.figures,
            "files": self.files,
            "notes": self.notes,
            "headline": self.headline,
        }
