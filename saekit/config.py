"""The run file: what it may hold, how it is read, and how `-o key=value` and command-line names change it.

Options of components are not validated here, since that needs their targets; `saekit.runner.plan` does it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saekit.component import validation_lines
from saekit.errors import UsageError, near_names
from saekit.schedules import Schedule


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Use(BaseModel):
    """A component by name, and its options: every key that is not a field of the section."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    use: str = Field(description="The component's name, short or qualified.")
    name: str | None = Field(default=None, description="What this entry is called in this run; `use` by default.")

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the component itself."""
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        """The entry's name in logs, metrics and overrides."""
        return self.name or self.use.rpartition(".")[2]


class ArchitectureUse(Use):
    """The sparse autoencoder."""

    d_sae: int | None = Field(default=None, gt=0, description="Number of latents; taken from `from` where that is given.")
    from_: str | None = Field(default=None, alias="from", description="Start from this SAE: a directory or a release.")


class LossUse(Use):
    """One term of the total loss."""

    weight: float | Schedule = Field(default=1.0, description="Multiplies the loss; a number or a schedule.")


class TrainingConfig(_Section):
    """How the SAE is trained."""

    tokens: int = Field(default=1_000_000, ge=0, description="Activations to train on; 0 for analysis alone.")
    batch_size: int = Field(default=2048, gt=0, description="Activations a step.")
    lr: float | Schedule = Field(default=1e-3, description="Learning rate; a number or a schedule.")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="Adam's decay rates.")
    clip: float | None = Field(default=1.0, gt=0, description="Largest norm of the whole gradient.")
    normalize: bool = Field(default=True, description="Train on activations scaled to a mean norm of sqrt(d_in).")
    seed: int = Field(default=0, ge=0, description="Decides initial weights, the order of the data and every draw.")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps.")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 runs on CUDA only.")
    threads: int | None = Field(default=None, gt=0, description="CPU threads; torch's own choice by default.")
    buffer: int = Field(default=65_536, gt=0, description="Activations in a shuffle block; each block is held in memory.")
    prefetch: int = Field(default=1, ge=0, description="Blocks harvested ahead in the background; 0 harvests in turn.")
    dead_after: int = Field(default=1_000_000, gt=0, description="A latent silent for so many activations is dead.")
    log_every: int = Field(default=10, gt=0, description="Steps between logged lines.")
    checkpoint_every: int = Field(default=200, gt=0, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(default=2, gt=0, description="Newest checkpoints that are kept.")
    guard_steps: int = Field(default=20, gt=0, description="After so many steps the gradient guard looks at what moved.")


class EvaluationConfig(_Section):
    """What the metrics see."""

    tokens: int = Field(default=100_000, gt=0, description="Held-out activations for the metrics.")
    batch_size: int = Field(default=4096, gt=0, description="Activations a batch of evaluation.")


class RunConfig(_Section):
    """A run file, whole."""

    recipe: str | None = Field(default=None, description="A word for what this run is; the file's stem by default.")
    directory: str = Field(default="runs", description="Where run directories are made.")
    plugins: list[str] = Field(default_factory=list, description="Python files to load as plugins.")
    requires: list[str] = Field(default_factory=list, description="pip requirements of the plugins that this file names.")
    defaults: bool = Field(default=True, description="Add the components that their plugins mark as default.")
    source: Use
    architecture: ArchitectureUse
    loss: list[LossUse] = Field(default_factory=list)
    callback: list[Use] = Field(default_factory=list)
    metric: list[Use] = Field(default_factory=list)
    analyzer: list[Use] = Field(default_factory=list)
    tracker: list[Use] = Field(default_factory=list)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    def to_toml(self) -> str:
        """The configuration as a run file that says the same."""
        import tomli_w

        return tomli_w.dumps(_without_none(self.model_dump(mode="json", by_alias=True)))


LISTS = ("loss", "callback", "metric", "analyzer", "tracker")
"""Sections that hold several entries, each with a name."""
SINGLES = ("source", "architecture")
"""Sections that hold one component."""


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dictionary; every way in which that can fail is a UsageError that names the file."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file.") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a directory; give a run file, or --resume for a run directory.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: is not valid TOML: {error}.") from None


def parse_value(text: str) -> Any:
    """A value of `-o key=value`: TOML where it is TOML, otherwise the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_use(text: str) -> dict[str, Any]:
    """`NAME[:key=value,...]` of the command line as the table that a run file would hold."""
    name, _, rest = text.partition(":")
    table: dict[str, Any] = {"use": name.strip()}
    for part in _split_outside_brackets(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{text!r}: {part!r} is not key=value; write NAME:key=value,key=value.")
        table[key.strip()] = parse_value(value.strip())
    return table


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part for part in (*parts, current) if part.strip()]


def override(table: dict[str, Any], assignment: str) -> None:
    """Apply `section.key=value` to a run file's dictionary, in place.

    In a section with several entries the second part is an entry's name: `loss.l1.weight=2`.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"-o {assignment}: write key=value, for example training.lr=1e-3.")
    keys = path.strip().split(".")
    target: Any = table
    for position, key in enumerate(keys[:-1]):
        if isinstance(target, list):
            target = _entry(target, key, assignment, keys[position - 1])
        else:
            target = target.setdefault(key, {})
        if not isinstance(target, (dict, list)):
            raise UsageError(f"-o {assignment}: {'.'.join(keys[: position + 1])} is a value, not a table.")
    if isinstance(target, list):
        raise UsageError(f"-o {assignment}: name a key of the entry, for example {path}.weight=2.")
    target[keys[-1]] = parse_value(text)


def _entry(entries: list[dict[str, Any]], name: str, assignment: str, section: str) -> dict[str, Any]:
    labels = {str(e.get("name") or str(e.get("use", "")).rpartition(".")[2]): e for e in entries}
    if name not in labels:
        raise UsageError(
            f"-o {assignment}: the run has no {section} called {name!r}.{near_names(name, labels)} "
            f"It has: {', '.join(labels) or 'none'}."
        )
    return labels[name]


def parse_config(table: Mapping[str, Any], where: str) -> RunConfig:
    """A run file's dictionary as a RunConfig; `where` names the file in errors."""
    try:
        config = RunConfig.model_validate(table)
    except ValidationError as error:
        raise UsageError("\n".join(f"{where}: {line}" for line in _config_lines(error))) from None
    for section in LISTS:
        labels = [entry.label for entry in getattr(config, section)]
        twice = {label for label in labels if labels.count(label) > 1}
        if twice:
            raise UsageError(
                f"{where}: {section}: two entries are called {twice.pop()!r}. Give one of them another name: name = \"...\"."
            )
    return config


def _config_lines(error: ValidationError) -> list[str]:
    lines = []
    for problem, line in zip(error.errors(), validation_lines(error)):
        if problem["type"] == "extra_forbidden":
            *parents, key = problem["loc"]
            model: Any = RunConfig
            for parent in parents:
                annotation = model.model_fields[str(parent)].annotation
                model = annotation if isinstance(annotation, type) else model
            path = ".".join(map(str, problem["loc"]))
            line = f"{path}: there is no such key.{near_names(str(key), model.model_fields)}"
        elif problem["type"] == "missing" and problem["loc"] in (("source",), ("architecture",)):
            section = problem["loc"][0]
            line = f"{section}: is missing. Add a table [{section}] with use = \"...\" (see: saekit plugins)."
        lines.append(line)
    return lines


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value


def table_of(values: Iterable[str], section: str, table: dict[str, Any]) -> None:
    """Add components given on the command line to a run file's dictionary: to a list, or in place of a single one."""
    for text in values:
        entry = parse_use(text)
        if section in SINGLES:
            keep = {k: v for k, v in table.get(section, {}).items() if section == "architecture" and k == "d_sae"}
            table[section] = {**keep, **entry}
        else:
            table.setdefault(section, []).append(entry)
