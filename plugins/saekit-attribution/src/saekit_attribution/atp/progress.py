"""The saved progress of an analysis: chunks, each written whole or not at all, so that an interrupted one can resume."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import to_jsonable, write_json
from saekit_attribution.effects.attribute import Outcome, Refused
from saekit_attribution.effects.batching import Failed
from saekit_attribution.effects.by_position import PositionScores
from saekit_attribution.effects.methods import Attribution

BEGUN = "atp_analysis.json"
CHUNKS = "atp_progress"

TENSORS = ("scores", "activations", "gradients", "weighted")
NUMBERS = ("error", "logit_diff", "moved")


class Progress:
    """The finished chunks of one analysis, on disk.

    directory: the analyzer's.
    identity: everything that determines the numbers (digests of data, model and SAE, the options); an analysis with
        another identity starts from the beginning.
    model: part of the results file's name.

    `atp_analysis.json` holds the identity and the name of the results file, which stays the same when an analysis is
    resumed or repeated. `atp_progress/` holds a file for each chunk, until `finish`.
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
        """The samples of a chunk as they were given to `save`; None for an unfinished chunk."""
        chunk = _read(self._file(number))
        return chunk["samples"] if chunk is not None and chunk.get("of") == self._digest else None

    def save(self, number: int, samples: list[dict[str, Any]]) -> None:
        """Save a finished chunk."""
        write_json(self._file(number), {"of": self._digest, "samples": samples})

    def finish(self) -> None:
        """Remove the chunks: their samples are in the results file."""
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
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def stored(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain JSON. Scores that are not finite are a failure: they cannot be ranked."""
    if isinstance(outcome, Refused):
        return {"skipped": outcome.reason}
    if isinstance(outcome, Failed):
        return {"error": outcome.error, "details": {"message": outcome.details}}
    for method, attribution in outcome.items():
        numbers = torch.tensor([getattr(attribution, name) for name in NUMBERS], dtype=torch.float64)
        if not all(bool(values.isfinite().all()) for values in (attribution.scores, attribution.activations, numbers)):
            return {"error": "NotFinite", "details": {"message": f"{method} gives scores that are not finite numbers"}}
    return {method: _as_lists(attribution) for method, attribution in outcome.items()}


def _as_lists(attribution: Attribution) -> dict[str, Any]:
    named = {name: getattr(attribution, name) for name in ("latents", *TENSORS, *NUMBERS)}
    lists = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in named.items()}
    places = attribution.by_position
    return lists | {"by_position": None if places is None else [dataclasses.asdict(place) for place in places]}


def restored(entry: dict[str, Any]) -> dict[str, Attribution]:
    """The attributions by method that were given to `stored`, bit for bit, in float64."""
    return {method: _attribution(lists) for method, lists in entry.items()}


def _attribution(lists: dict[str, Any]) -> Attribution:
    tensors = {
        name: None if lists[name] is None else torch.tensor(lists[name], dtype=torch.float64) for name in TENSORS
    }
    latents = torch.tensor(lists["latents"], dtype=torch.int64)
    places = lists["by_position"]
    return Attribution(
        latents=latents,
        **tensors,  # type: ignore[arg-type]
        **{name: lists[name] for name in NUMBERS},
        by_position=None if places is None else tuple(PositionScores(**place) for place in places),
    )
