"""What a checkpoint holds and how it comes back: all that a resumed run needs to end at the same bits.

The format on disk is in `training/checkpoint.py`, the comparison with the run that is resumed in `runner/resume.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from saekit.errors import PluginError, RunError, UsageError
from saekit.options import validation_lines
from saekit.training import checkpoint

if TYPE_CHECKING:
    from saekit.protocols import Source
    from saekit.training.trainer import Trainer


_SOURCE = "source."
Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass
class RunState:
    """A run after some steps, with every SAE that it trains.

    step: how many steps are done.
    position: (block, offset) of the first activation that no batch has had yet.
    decisive: what decides the weights, see `runner/resume.py`.
    plugins: their names and versions.
    threads: CPU threads.
    warnings, warnings_of: what the user has been told about the run, and about each SAE by its variant's name.
    trainer, tensors: the plain values and the tensors of all SAEs; those of a variant have names that begin with `variant.NAME.`,
        those of a source that is fed by a program with `source.`.
    """

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)

    step: Count
    position: tuple[Count, Count]
    decisive: dict[str, Any]
    plugins: list[dict[str, str]]
    threads: int
    warnings: list[str]
    warnings_of: dict[str, list[str]]
    trainer: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, trainer: Trainer) -> None:
        """Take in one SAE in training, and torch's own generators as they are now."""
        tensors, values = state_of(trainer)
        prefix = _prefix(trainer)
        self.tensors |= {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        self.trainer |= {f"{prefix}{name}": value for name, value in values.items()}

    def restore(self, trainer: Trainer) -> None:
        """Put the SAE of `trainer`, and torch's own generators, back to where they were after `step` steps."""
        prefix = _prefix(trainer)
        restore(trainer, self.step, _below(prefix, self.tensors), _below(prefix, self.trainer))

    def add_source(self, source: Source) -> None:
        """Take in what the source keeps, if it is one that must: see `protocols.PushedSource`."""
        if hasattr(source, "state_dict"):
            _take(source.state_dict(), _SOURCE, self.tensors, self.trainer)

    def restore_source(self, source: Source) -> None:
        """Give the source back what `add_source` took."""
        if hasattr(source, "load_state_dict"):
            source.load_state_dict({**_below(_SOURCE, self.tensors), **_below(_SOURCE, self.trainer)})

    def save(self, directory: Path, keep: int) -> Path:
        """Write a checkpoint into `directory`, of which the newest `keep` remain."""
        values = {name: value for name, value in vars(self).items() if value is not self.tensors}
        return checkpoint.save(directory, self.step, self.tensors, values, keep)

    @classmethod
    def newest(cls, directory: Path) -> tuple[Path, RunState, list[str]] | None:
        """The newest whole checkpoint with its path, and a warning for each damaged one; None if there is none."""
        path, tensors, values, warnings = checkpoint.newest_whole(directory)
        if path is None:
            return None
        try:
            state = TypeAdapter(cls).validate_python(dict(values, tensors=tensors))
        except ValidationError as error:
            raise UsageError("\n".join(validation_lines(error, str(path / checkpoint.STATE), values))) from None
        return path, state, warnings


def state_of(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, plain values) from which `restore` brings back one SAE in training exactly."""
    trainer.read_losses()
    tensors = {f"sae.{name}": tensor for name, tensor in trainer.sae.state_dict().items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"{name} is not finite after step {trainer.number - 1}, so it is not saved; the last checkpoint is from "
                "before and is kept. Start a run with a lower training.lr."
            )
    for name, parameter in trainer.named_parameters:
        for key, value in trainer.optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    tensors |= {f"firing.{name}": tensor for name, tensor in trainer.firing.state_dict().items()}
    tensors["rng.listeners"] = trainer.generator.get_state()
    tensors["rng.torch"] = torch.get_rng_state()
    if trainer.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(trainer.device)
    values: dict[str, Any] = {
        "scale": trainer.scale,
        "target_scale": trainer.target_scale,
        "spoke": sorted(trainer.spoke),
        "last_logged": trainer.last_logged,
        "path": trainer.sae.path_state(),
    }
    for prefix, holder in _stateful(trainer):
        _take(holder.state_dict(), prefix, tensors, values)
    return tensors, values


def _take(state: dict[str, Any], prefix: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put a `state_dict` among the tensors and the plain values, with `prefix` before its names."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
        else:
            values[f"{prefix}{key}"] = plain_state(value, f"{prefix}{key}")


def restore(trainer: Trainer, number: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Bring back what `state_of` gave after `number` steps."""
    trainer.number = number
    trainer.scale, trainer.target_scale = values["scale"], values["target_scale"]
    trainer.sae.load_state_dict(_below("sae.", tensors))
    for name, parameter in trainer.named_parameters:
        for key, value in _below(f"optimizer.{name}.", tensors).items():
            # Adam's moments take the parameter's layout in memory; `step` is a number with a separate dtype.
            like = torch.empty_like(value) if key == "step" else torch.empty_like(parameter)
            trainer.optimizer.state[parameter][key] = like.copy_(value).to(trainer.device)
    trainer.firing.load_state_dict(_below("firing.", tensors))
    trainer.generator.set_state(tensors["rng.listeners"])
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], trainer.device)
    trainer.spoke = set(values["spoke"])
    trainer.sae.load_path_state(values["path"])
    trainer.last_logged = values["last_logged"]
    if number >= trainer.config.guard_steps:
        trainer.guard = None
    for prefix, holder in _stateful(trainer):
        state = {**_below(prefix, tensors), **_below(prefix, values)}
        if state:
            try:
                holder.load_state_dict(state)
            except Exception as error:
                raise PluginError(
                    f"{prefix.removesuffix('.')} cannot take back the state it gave to the checkpoint: "
                    f"{type(error).__name__}: {error}. Was its plugin changed since?"
                ) from error


def plain_state(value: Any, key: str) -> Any:
    """`value`, if a JSON file gives it back as it is; PluginError otherwise."""
    if not _is_plain(value):
        raise PluginError(
            f"the state of {key} cannot be saved: {type(value).__name__} {value!r} is more than a checkpoint holds. A "
            "state_dict maps names to tensors, numbers, texts, and lists and dictionaries (with texts as keys) of those."
        )
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _stateful(trainer: Trainer) -> list[tuple[str, Any]]:
    """The losses and listeners that keep a state, each with the prefix of its names."""
    holders = [(f"loss.{term.label}.", term.function) for term in trainer.terms]
    holders += [(f"listener.{listener.label}.", listener.instance) for listener in trainer.listeners]
    return [(p, h) for p, h in holders if hasattr(h, "state_dict") and hasattr(h, "load_state_dict")]


def _prefix(trainer: Trainer) -> str:
    return f"variant.{trainer.variant}." if trainer.variant else ""


def _below(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
