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
from saekit.files import disk_errors, flush_to_disk, sha256_of, to_jsonable, write_text
from saekit.variants import SHARED

TENSORS, STATE = "tensors.safetensors", "state.json"
FORMAT = 2
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
            whole = {"format": FORMAT, **state, "step": number, "sha256": sha256_of(temporary / TENSORS)}
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


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the host, in order, and no two in the same memory (tied weights are)."""
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
    """(tensors, state) of one checkpoint; a UsageError that names the file if anything is cut short or altered."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UsageError(
                f"{path}: has format {state['format']!r}, and this version of saekit reads {FORMAT}. Finish the run with "
                "the version of saekit that began it (see provenance.json), or start a new one."
            )
        digest = sha256_of(path / TENSORS)
        if digest != state["sha256"]:
            raise UsageError(f"{path / TENSORS}: is damaged or cut short (its checksum is not the one in {STATE}).")
        return load_file(path / TENSORS), state
    except KeyError as error:
        raise UsageError(f"{path / STATE}: is not a whole checkpoint: {error.args[0]!r} is missing.") from None
    except (OSError, ValueError, TypeError, SafetensorError) as error:
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


def decisive(config: RunConfig, source: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights, flat: two runs that agree in it train the same SAE. Keys are those of the run file.

    source: the source's own account of model and data, since a file may change where its name does not.
    """
    flat: dict[str, Any] = {}
    for variant, own in config.members().items():
        for key, value in _of_member(own).items():
            flat[f"variant.{variant}.{key}" if variant and not key.startswith(_OF_ALL) else key] = value
    if config.variant:
        flat["variant"] = ", ".join(variant.name for variant in config.variant)
    _flatten("identity of the source", to_jsonable(source), flat)
    return flat


def _of_member(config: RunConfig) -> dict[str, Any]:
    """What decides the weights of one SAE."""
    whole = config.model_dump(by_alias=True)
    flat: dict[str, Any] = {}
    for section in ("source", "architecture", "training"):
        _flatten(section, whole[section], flat)
    for section in ("loss", "callback"):
        labels = [entry.label for entry in getattr(config, section)]
        flat[section] = ", ".join(labels)
        for label, entry in zip(labels, whole[section], strict=True):
            _flatten(f"{section}.{label}", entry, flat)
    return {key: value for key, value in flat.items() if key not in _IDLE}


_OF_ALL = ("source.", *(f"training.{key}" for key in SHARED if key != "data_seed"))
"""Keys in which variants do not differ; `data_seed` follows from the `seed` of each."""
_IDLE = {f"training.{key}" for key in ("log_every", "checkpoint_every", "keep_checkpoints", "prefetch", "guard_steps")}
_IDLE |= {"source.cache"}  # where it lies; what is in it is part of the source's identity


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(f"{prefix}.{key}", inner, into)
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            _flatten(f"{prefix}.{position}", inner, into)
    elif value is not None:
        into[prefix] = value if isinstance(value, str | int | float) else str(value)


def refuse_other(path: Path, state: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UsageError if what was `decisive` for the checkpoint differs from what it is `now`."""
    before = state["decisive"]
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            was, is_now = (repr(v[key]) if key in v else "not given" for v in (before, now))
            fix = f"Put {key} back in run.toml, or start a new run."
            if key.startswith("identity of the source"):
                fix = "The model or the data has changed. Bring back what the run was begun with, or start a new run."
            raise UsageError(f"{path}: was made by another configuration: {key} was {was} and is now {is_now}. {fix}")
