"""An analysis in chunks, each saved whole or not at all, that goes on after an interruption where it stopped."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saekit import to_jsonable, write_json

BEGUN = "atp_analysis.json"
CHUNKS = "atp_progress"


class Progress:
    """What of one analysis is done, on disk.

    directory: the analyzer's. identity: everything that determines the numbers (digests of data, model and SAE, the
    options); an analysis of another identity begins anew. model: for the name of the file of results.

    `atp_analysis.json` holds the identity and the name of the file of results, which an analysis keeps when it is
    resumed or done again. `atp_progress/` holds a file for each chunk, until `finish`.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], model: str) -> None:
        self.directory, self.identity = directory, to_jsonable(dict(identity))
        self._digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self._chunks = directory / CHUNKS
        begun = _read(directory / BEGUN)
        if begun is None or begun.get("identity") != self.identity or not isinstance(begun.get("results"), str):
            shutil.rmtree(self._chunks, ignore_errors=True)
            begun = {"identity": self.identity, "results": self._new_name(model)}
            write_json(directory / BEGUN, begun)
        self.results = directory / str(begun["results"])
        self._chunks.mkdir(exist_ok=True)

    def load(self, number: int) -> list[dict[str, Any]] | None:
        """The samples of a chunk as `save` was given them; None where it is not done."""
        chunk = _read(self._file(number))
        return chunk["samples"] if chunk is not None and chunk.get("of") == self._digest else None

    def save(self, number: int, samples: list[dict[str, Any]]) -> None:
        """Keep a chunk that is done."""
        write_json(self._file(number), {"of": self._digest, "samples": samples})

    def finish(self) -> None:
        """Remove the chunks: their samples are in the file of results."""
        shutil.rmtree(self._chunks, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._chunks / f"{number:06d}.json"

    def _new_name(self, model: str) -> str:
        word = re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"
        stem = f"atp_results_{word[:80]}_{datetime.datetime.now():%Y%m%d_%H%M%S}"
        taken = {path.stem for path in self.directory.glob("atp_results_*.json")}
        names = (stem if n == 1 else f"{stem}-{n}" for n in range(1, len(taken) + 2))
        return next(name for name in names if name not in taken) + ".json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
