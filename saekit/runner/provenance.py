"""What produced a run: versions, hashes, seed and command line, so that a number can be traced."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from saekit.files import parse_json
from saekit.runner.plan import RunPlan, SAEPlan

LIBRARIES = ("torch", "transformers", "transformer_lens", "sae_lens", "numpy", "safetensors", "pydantic", "pluggy")


def provenance(plan: SAEPlan | RunPlan, identity: dict[str, Any]) -> dict[str, Any]:
    """The content of `provenance.json`; `identity` is what the source says about model and data."""
    return {
        "saekit": importlib.metadata.version("saekit"),
        "plugins": plugins_used(plan),
        "source": identity,
        "seed": plan.config.training.seed,
        "threads": torch.get_num_threads(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def with_resumption(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The content of `path`, from the beginning of the run, with what is different `now` added under "resumed"."""
    try:
        begun = parse_json(path.read_text(encoding="utf-8"))
        resumed = [*begun.pop("resumed", []), {key: value for key, value in now.items() if begun.get(key) != value}]
    except (OSError, ValueError, AttributeError):
        return now
    return {**begun, "resumed": resumed}


def plugins_used(plan: SAEPlan | RunPlan) -> list[dict[str, str]]:
    """Each plugin that this run uses, with its distribution and version."""
    used = {}
    for component in (component for part in plan.parts for component in part.components):
        used[component.plugin] = {
            "name": component.plugin,
            "distribution": component.distribution,
            "version": component.version,
        }
    return list(used.values())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
