"""Checkpoints on disk: a directory each, whole or absent, of plain files (safetensors and JSON), never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from saekit.errors import UsageError
from saekit.files import disk_errors, flush_to_disk, parse_json, sha256_of, write_text

TENSORS, STATE = "tensors.safetensors", "state.json"
FORMAT = 3
"""Raised when a checkpoint's content changes, so that an older one is refused and not misread."""


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
            save_file(_separate(tensors), temporary / TENSORS)
            flush_to_disk(temporary / TENSORS)
            whole = {"format": FORMAT, **state, "step": number}
            whole["sha256"] = _checksum(temporary / TENSORS, whole)
            # Not `write_json`, which has no infinity: a component may keep one ("the best loss so far").
            write_text(temporary / STATE, json.dumps(whole, indent=2) + "\n")
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


def _checksum(tensors: Path, state: dict[str, Any]) -> str:
    """SHA-256 of the state, without its checksum, and of the file with the tensors."""
    return hashlib.sha256(f"{json.dumps(state, sort_keys=True)} {sha256_of(tensors)}".encode()).hexdigest()


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the host, contiguous, and no two in the same memory, as tied weights are."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain_tensor = tensor.detach().cpu().contiguous()
        place = plain_tensor.untyped_storage().data_ptr()
        apart[name] = plain_tensor.clone() if place in seen else plain_tensor
        seen.add(place)
    return apart


def found(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, newest first."""
    return sorted(directory.glob("step-*"), reverse=True) if directory.is_dir() else []


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of one checkpoint; UsageError that names the file if anything is cut short or altered."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = parse_json((path / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UsageError(
                f"{path}: has format {state['format']!r}, and this version of saekit reads {FORMAT}. Finish the run with "
                "the version of saekit that began it (see provenance.json), or start a new one."
            )
        if state.pop("sha256") != _checksum(path / TENSORS, state):
            raise UsageError(f"{path}: {TENSORS} or {STATE} is damaged or cut short: the checksum in {STATE} is another.")
        return load_file(path / TENSORS), state
    except KeyError as error:
        raise UsageError(f"{path / STATE}: is not a whole checkpoint: {error.args[0]!r} is missing.") from None
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UsageError(f"{path}: is not a whole checkpoint: {error}.") from None


def newest_whole(directory: Path) -> tuple[Path | None, dict[str, Tensor], dict[str, Any], list[str]]:
    """(path, tensors, state, warnings) of the newest whole checkpoint; path is None if there is no checkpoint.

    A damaged one is skipped with a warning. UsageError if all are damaged.
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
