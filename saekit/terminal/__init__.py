"""What a run shows on stderr: a live view or plain lines while it runs, and a summary at the end."""

from __future__ import annotations

import os
import sys
from typing import Any


def choose_view(json: bool = False) -> Any:
    """The listener that shows a run: live if stderr is a terminal that can redraw, otherwise in plain lines.

    `json` (stdout carries a document for a script), NO_COLOR and TERM=dumb choose plain lines.
    """
    encoding = (getattr(sys.stderr, "encoding", None) or "").lower()
    plain = (
        json
        or sys.stderr is None
        or not sys.stderr.isatty()
        or bool(os.environ.get("NO_COLOR"))
        or os.environ.get("TERM", "").lower() in ("dumb", "unknown")
        or not encoding.startswith("utf")  # other encodings lack the characters that the live view draws with
    )
    if plain:
        from saekit.terminal.lines import LinesView

        return LinesView()
    from saekit.terminal.view import LiveView

    return LiveView()
