"""The built-in tracker: one JSON line a logged step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, TextIO

from saekit.files import plain, write_text
from saekit.hookspecs import hookimpl


class JsonLines:
    """Writes `metrics.jsonl` in the run directory: step, tokens, seconds, and every logged value.

    After a resume the file is cut back to the checkpoint, so that no step stands in it twice.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._path: Path | None = None
        self._started = time.perf_counter()

    @hookimpl
    def run_started(self, run: Any) -> None:
        self._path = run.directory.path / "metrics.jsonl"

    @hookimpl
    def training_started(self, trainer: Any) -> None:
        assert self._path is not None
        kept = [line for line in _whole_lines(self._path) if line["step"] < trainer.number]
        if kept:
            self._started -= kept[-1]["seconds"]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))  # whole, or as it was
        self._file = self._path.open("a", encoding="utf-8")

    @hookimpl
    def logged(self, number: int, values: dict[str, float]) -> None:
        assert self._file is not None
        line = {"step": number, "seconds": round(time.perf_counter() - self._started, 3), **plain(values)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    @hookimpl
    def run_finished(self) -> None:
        self._close()

    @hookimpl
    def run_failed(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of an earlier part of the run; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or "step" not in line or "seconds" not in line:
            break
        lines.append(line)
    return lines
