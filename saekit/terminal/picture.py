"""The live view and the summary of a finished run as an SVG: `python -m saekit.terminal.picture RUN_DIR OUT.svg`."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from saekit.errors import SaekitError, UsageError
from saekit.files import write_text
from saekit.run_directory import read_run
from saekit.terminal import output
from saekit.terminal.block import draw
from saekit.terminal.state import RunState
from saekit.terminal.summary import render_summary
from saekit.wording import is_number

WIDTH = 96


def picture(summary: dict[str, Any], history: list[dict[str, Any]], width: int = WIDTH) -> str:
    """The final state of the view as SVG text, redrawn from `summary.json` and the lines of `metrics.jsonl`."""
    console = output.console(
        file=io.StringIO(), record=True, width=width, height=60, force_terminal=True, color_system="truecolor"
    )
    console.print()
    console.print(draw(replay(summary, history), width, 60, now=0.0))
    render_summary(summary, console)
    svg = console.export_svg(title="saekit run")
    # rich loads its font from a server, which a picture in a README must not do. Glyph positions do not depend on it.
    svg = re.sub(r"@font-face\s*\{[^}]*\}", "", svg)
    return svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")


def replay(summary: dict[str, Any], history: list[dict[str, Any]]) -> RunState:
    """The state of the view at the end of training; the metrics are in the summary."""
    state = RunState(title=str(summary.get("run") or ""))
    sae = summary.get("sae") or {}
    size = f" {sae['d_sae']:,}" if sae.get("d_sae") else ""
    facts = (f"{sae.get('architecture') or 'SAE'}{size}", summary.get("model"), summary.get("hook_point"))
    state.subject = " · ".join(str(fact) for fact in facts if fact)
    for name, seconds in (summary.get("seconds") or {}).items():
        state.phase(name).end(seconds)
    state.phase("train").total = summary.get("tokens")
    trainer: Any = SimpleNamespace(variant="", total_steps=summary.get("steps"), sae=SimpleNamespace(d_sae=sae.get("d_sae")))
    for line in history:
        values = {key: value for key, value in line.items() if key not in ("step", "seconds") and is_number(value)}
        state.training_of(trainer).log(int(line.get("step", 0)) + 1, values)
    return state


def main(arguments: list[str]) -> int:
    """Draw the run directory given first into the file given second."""
    try:
        if len(arguments) != 2:
            raise UsageError("usage: python -m saekit.terminal.picture RUN_DIR OUT.svg")
        run = read_run(Path(arguments[0]))
        if not run.summary:
            raise UsageError(f"{arguments[0]}: has no readable summary.json; the run has not finished.")
        write_text(Path(arguments[1]), picture(run.summary, run.history))
    except SaekitError as error:
        output.echo(error, err=True)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
