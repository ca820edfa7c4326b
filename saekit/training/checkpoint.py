"""Checkpoints: a directory each, whole or absent, of plain files (safetensors and JSON), never a pickle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from saekit.config import RunConfig
from saekit.errors import UsageError
from saekit.files import disk_errors, flush_to_disk, sha256_of, write_json

TENSORS, STATE = "tensors.safetensors", "state.json"


def save(directory: Path, number: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint after `number` steps into `directory` and remove all but the newest `keep`."""
    from safetensors.torch import save_file

    final = directory / f"step-{number:08d}"
    temporary = directory / f".step-{number:08d}.{os.getpid()}.tmp"
    with disk_errors(final):
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            temporary.mkdir()
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / TENSORS)
            flush_to_disk(temporary / TENSORS)
            write_json(temporary / STATE, {**state, "step": number, "sha256": sha256_of(temporary / TENSORS)})
            flush_to_disk(temporary)
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        flush_to_disk(directory)
    for old in found(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def found(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, newest first."""
    return sorted(directory.glob("step-*"), reverse=True) if directory.is_dir() else []


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of one checkpoint; a UsageError that names the file if anything is cut short or altered."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        digest = sha256_of(path / TENSORS)
        if digest != state["sha256"]:
            raise UsageError(f"{path / TENSORS}: is damaged or cut short (its checksum is not the one in {STATE}).")
        return load_file(path / TENSORS), state
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UsageError(f"{path}: is not a whole checkpoint: {error}.") from None


def newest_whole(directory: Path) -> tuple[Path | None, dict[str, Tensor], dict[str, Any], list[str]]:
    """(path, tensors, state, warnings) of the newest checkpoint that is whole; path is None where there is none at all.

    A damaged one is passed over with a warning; if all are damaged, that is a UsageError.
    """
    warnings: list[str] = []
    checkpoints = found(directory)
    for path in checkpoints:
        try:
            tensors, state = load(path)
        except UsageError as error:
            warnings.append(str(error))
        else:
            return path, tensors, state, warnings
    if checkpoints:
        raise UsageError(
            "\n".join([*warnings, f"{directory}: no checkpoint is whole. Remove the directory to train from the start."])
        )
    return None, {}, {}, []


def decisive(config: RunConfig) -> dict[str, Any]:
    """What of the configuration decides the weights, flat: two runs that agree in it train the same SAE."""
    whole = config.model_dump(mode="json", by_alias=True)
    flat: dict[str, Any] = {}
    for section in ("source", "architecture", "loss", "callback", "training"):
        _flatten(section, whole[section], flat)
    return {key: value for key, value in flat.items() if key not in _IDLE}


_IDLE = {f"training.{key}" for key in ("log_every", "checkpoint_every", "keep_checkpoints", "prefetch", "guard_steps")}


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(f"{prefix}.{key}", inner, into)
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            _flatten(f"{prefix}.{position}", inner, into)
    elif value is not None:
        into[prefix] = value


def refuse_other(path: Path, state: dict[str, Any], config: RunConfig) -> None:
    """Raise UsageError if the checkpoint was made by a configuration that would train something else."""
    before, now = state["config"], decisive(config)
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise UsageError(
                f"{path}: was made by another configuration: {key} was {before.get(key)!r} and is now {now.get(key)!r}. "
                f"Put {key} back in run.toml, or start a new run."
            )
