"""`Result`: what an analyzer returns, and its form on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """What an analyzer found.

    scalars: numbers by name, shown in the summary; None if a value is not defined. NAME_low, NAME_high and NAME_n are shown
        beside NAME: the interval and the number of cases behind it.
    tables: lists of rows by name; a row is a dictionary of plain values. Rows with `latent`, `activation` and `example`,
        what `Example.to_json` gives, are shown by latent (`saekit.example_rows` makes such a table).
    figures: plotly figures by name, as the dictionaries of `figure.to_plotly_json()`.
    files: what the analyzer wrote, as paths relative to its directory.
    notes: sentences that a reader of the figures must know (a null result and its reason, a low fidelity).
    headline: the names of the scalars that `saekit compare` shows by default.
    """

    scalars: dict[str, float | int | None] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    headline: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Result:
        """The result in a `result.json`."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

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
