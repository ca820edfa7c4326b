"""Whether a checkpoint belongs to the run that is resumed, and what has changed in between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from saekit.config import IDLE, RunConfig, SourceUse, TrainingConfig, keys_with
from saekit.errors import UsageError
from saekit.files import to_jsonable
from saekit.training.state import RunState
from saekit.variants import SHARED, run_configs

_IDENTITY = "identity of the source"


def decisive(config: RunConfig, source: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights, flat: two runs that agree in it train the same SAE. Keys are those of the run file.

    source: the identity of model and data as the source gives it, since a file may change under the same name.
    """
    flat: dict[str, Any] = {}
    for variant, own in run_configs(config).items():
        for key, value in _of_one(own).items():
            flat[f"variant.{variant}.{key}" if variant and not key.startswith(_OF_ALL) else key] = value
    if config.variant:
        flat["variant"] = ", ".join(variant.name for variant in config.variant)
    _flatten(_IDENTITY, to_jsonable(source), flat)
    return flat


def _of_one(config: RunConfig) -> dict[str, Any]:
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
"""Keys that are the same for all variants. `data_seed` is not among them, since it follows from each one's `seed`."""
_IDLE = {
    f"{section}.{key}" for section, model in (("training", TrainingConfig), ("source", SourceUse)) for key in keys_with(IDLE, model)
}


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(f"{prefix}.{key}", inner, into)
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            _flatten(f"{prefix}.{position}", inner, into)
    elif value is not None:
        into[prefix] = value if isinstance(value, str | int | float) else str(value)


def refuse_other(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """UsageError if what was `decisive` for the checkpoint at `path` differs from what it is `now`."""
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            was, is_now = (repr(v[key]) if key in v else "not given" for v in (before, now))
            fix = f"Put {key} back in run.toml, or start a new run."
            if key.startswith(_IDENTITY):
                fix = "The model or the data has changed. Bring back what the run was begun with, or start a new run."
            raise UsageError(f"{path}: was made by another configuration: {key} was {was} and is now {is_now}. {fix}")


def what_changed(state: RunState, plugins: list[dict[str, str]]) -> Iterator[str]:
    """A warning for each thing that may move the last bits of the weights. plugins: those of the run now."""
    threads = torch.get_num_threads()
    if state.threads != threads:
        yield (
            f"The run was begun with {state.threads} CPU threads and goes on with {threads}: its weights may differ in the "
            "last digits from those of a run that was not interrupted."
        )
    now_used = {plugin["name"]: plugin for plugin in plugins}
    for was in state.plugins:
        now = now_used.get(was["name"], was)
        if was != now:
            yield (
                f"Plugin {now['name']!r} has changed since the run was begun: it was {was['distribution']} "
                f"{was['version']} and is {now['distribution']} {now['version']}."
            )
