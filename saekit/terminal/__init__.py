"""What a run shows on stderr: a live view or plain lines while it goes on, a summary at its end."""

from __future__ import annotations

import os
import sys
from typing import Any


def choose_view(json: bool = False) -> Any:
    """The listener that shows a run: live where stderr is a terminal that can redraw, otherwise plain lines.

    `json` says that stdout carries a document for a script; NO_COLOR and TERM=dumb ask for plain lines as well.
    """
    encoding = (getattr(sys.stderr, "encoding", None) or "").lower()
    plain = (
        json
        or sys.stderr is None
        or not sys.stderr.isatty()
        or bool(os.environ.get("NO_COLOR"))
        or os.environ.get("TERM", "").lower() in ("dumb", "unknown")
        or not encoding.startswith("utf")  # the live view draws with characters that others lack
    )
    if plain:
        from saekit.terminal.lines import PlainView

        return PlainView()
    from saekit.terminal.view import LiveView

    return LiveView()
