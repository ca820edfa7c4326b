"""The run file: what it may hold, how it is read, and how `-o key=value` and command-line names change it.

Options of components are not validated here, since that needs their targets; `saekit.runner.plan` does it.
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saekit.errors import UsageError, near_names
from saekit.options import no_true_for_a_number, validation_lines
from saekit.schedules import SCHEDULES, Scheduled
from saekit.variants import Variant, changed, check_variant


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Use(BaseModel):
    """A component by name, and its options: every key that is not a field of the section."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    use: str = Field(min_length=1, description="The component's name, short or qualified.")
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]+$",  # it names files, and keys that are divided by dots
        description="What this entry is called in this run; `use` by default.",
    )

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the component itself."""
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        """The entry's name in logs, metrics and overrides."""
        return self.name or self.use.rpartition(".")[2]


class SourceUse(Use):
    """Where activations come from."""

    cache: str | None = Field(
        default=None, description="A directory that keeps the activations: written by the first run, read by the next."
    )
    cache_tokens: int | None = Field(
        default=None, gt=0, description="Training activations to keep; one pass over the data by default."
    )
    cache_dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None, description="What they are kept in; float32 by default, the other two take half the room."
    )


class ArchitectureUse(Use):
    """The sparse autoencoder."""

    d_sae: int | None = Field(default=None, gt=0, description="Number of latents; taken from `from` where that is given.")
    from_: str | None = Field(default=None, alias="from", description="Start from this SAE: a directory, or RELEASE:SAE_ID.")


class LossUse(Use):
    """One term of the total loss."""

    weight: Scheduled = Field(default=1.0, description="Multiplies the loss; a number or a schedule.")


class GraphUse(Use):
    """The feature graph of the trained SAE."""

    tokens: int | None = Field(
        default=None, gt=0, description="Training activations whose codes the builder is given; `evaluation.tokens` by default."
    )


_Share = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(_Section):
    """How the SAE is trained."""

    tokens: int = Field(default=1_000_000, ge=0, description="Activations to train on; 0 for analysis alone.")
    batch_size: int = Field(default=2048, gt=0, description="Activations a step.")
    lr: Scheduled = Field(default=1e-3, description="Learning rate; a number or a schedule.")
    betas: tuple[_Share, _Share] = Field(default=(0.9, 0.999), description="Adam's decay rates.")
    clip: float = Field(default=1.0, ge=0, description="Largest norm of the whole gradient; 0 leaves it as it is.")
    normalize: bool = Field(default=True, description="Train on activations scaled to a mean norm of sqrt(d), each site by itself.")
    seed: int = Field(default=0, ge=0, description="Decides initial weights, the order of the data and every draw.")
    data_seed: int | None = Field(default=None, ge=0, description="Decides the order of the data alone; `seed` by default.")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps.")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 runs on CUDA only.")
    threads: int | None = Field(default=None, gt=0, description="CPU threads; torch's own choice by default.")
    sequences: int = Field(default=32, gt=0, description="Whole labelled sequences a step, where a loss needs them.")
    buffer: int = Field(default=65_536, gt=0, description="Activations in a shuffle block; each block is held in memory.")
    prefetch: int = Field(default=1, ge=0, description="Blocks harvested ahead in the background; 0 harvests in turn.")
    dead_after: int = Field(default=1_000_000, gt=0, description="A latent silent for so many activations is dead.")
    log_every: int = Field(default=10, gt=0, description="Steps between logged lines.")
    checkpoint_every: int = Field(default=200, gt=0, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(default=2, gt=0, description="Newest checkpoints that are kept.")
    guard_steps: int = Field(default=20, gt=0, description="After so many steps the gradient guard looks at what moved.")

    @property
    def order_seed(self) -> int:
        """The seed of everything that is drawn for the data: its order, and samples of it."""
        return self.seed if self.data_seed is None else self.data_seed


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
    source: SourceUse = Field(description="Where activations come from.")
    architecture: ArchitectureUse = Field(description="The sparse autoencoder.")
    loss: list[LossUse] = Field(default_factory=list, description="The terms of the total loss.")
    graph: GraphUse | None = Field(default=None, description="The feature graph to build of the trained SAE.")
    callback: list[Use] = Field(default_factory=list, description="Listeners that may change the run.")
    metric: list[Use] = Field(default_factory=list, description="Measures on held-out data.")
    analyzer: list[Use] = Field(default_factory=list, description="Questions asked of the trained SAE.")
    tracker: list[Use] = Field(default_factory=list, description="Listeners that write down what happens.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="How the SAE is trained.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="What the metrics see.")
    variant: list[Variant] = Field(default_factory=list, description="SAEs to train in one pass, in place of the one.")

    def members(self) -> dict[str, RunConfig]:
        """The configuration of each SAE that is trained, as if it were alone: one for each variant by its name; where there
        is none this one, under the empty name."""
        if not self.variant:
            return {"": self}
        return {variant.name: RunConfig.model_validate(changed(self, variant)) for variant in self.variant}

    def to_toml(self) -> str:
        """The configuration as a run file that says the same."""
        import tomli_w

        # Not in pydantic's JSON mode, which has no infinity: an option of a component may be one.
        return tomli_w.dumps(_without_none(self.model_dump(by_alias=True)))


LISTS = ("loss", "callback", "metric", "analyzer", "tracker")
"""Sections that hold several entries, each with a name."""
SINGLES = ("source", "architecture", "graph")
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


def check_shape(table: Mapping[str, Any], where: str) -> None:
    """UsageError where a section is not a table, or a list of tables, which all that reads them takes for granted."""
    for section in SINGLES:
        if not isinstance(table.get(section, {}), Mapping):
            raise UsageError(f'{where}: {section}: is not a table. Write [{section}] and under it use = "...".')
    for section in ("training", "evaluation"):
        if not isinstance(table.get(section, {}), Mapping):
            raise UsageError(f"{where}: {section}: is not a table. Write [{section}] and its keys under it.")
    for section in LISTS:
        entries = table.get(section, [])
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise UsageError(
                f"{where}: {section}: is not a list of tables. Write each entry as [[{section}]], in double brackets, "
                'and under it use = "...".'
            )
    variants = table.get("variant", [])
    if not isinstance(variants, list) or not all(isinstance(entry, Mapping) for entry in variants):
        raise UsageError(
            f"{where}: variant: is not a list of tables. Write each variant as [[variant]], in double brackets, and under it "
            'name = "..." and what is to be different.'
        )
    files = table.get("plugins", [])
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise UsageError(f'{where}: plugins: is not a list of files. Write plugins = ["./my_loss.py"].')


def parse_value(text: str) -> Any:
    """A value of `-o key=value`: TOML where it is TOML (but for dates), otherwise the text itself."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A date, or a text of several lines that reads as further keys, is a text to whoever typed it.
    return text if len(table) > 1 or isinstance(table["value"], datetime.date | datetime.time) else table["value"]


def parse_use(text: str) -> dict[str, Any]:
    """`NAME[:key=value,...]` of the command line as the table that a run file would hold."""
    name, _, rest = text.partition(":")
    table: dict[str, Any] = {"use": name.strip()}
    for part in _assignments(rest, text):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{text!r}: {part!r} is not key=value; write NAME:key=value,key=value.")
        table[key.strip()] = parse_value(value.strip())
    return table


def _assignments(text: str, whole: str) -> list[str]:
    """`text` divided at its commas, but for those inside a value that begins with a bracket or a quote."""
    parts, current, depth, quote, escaped = [], "", 0, "", False
    value_begins = False
    for character in text:
        if character == "," and not depth and not quote:
            parts.append(current)
            current, value_begins = "", False
            continue
        if quote:
            closes = character == quote and not escaped
            escaped = character == "\\" and quote == '"' and not escaped
            quote = "" if closes else quote
        elif character in "\"'" and value_begins:
            quote = character
        elif character in "[{" and (value_begins or depth):
            depth += 1
        elif character in "]}" and depth:
            depth -= 1
        begins_now = character in "[{,=" if depth else character == "=" and "=" not in current
        value_begins = not quote and (begins_now or (value_begins and character.isspace()))
        current += character
    if depth or quote:
        raise UsageError(f"{whole!r}: a bracket or a quote is not closed. Write NAME:key=value,key=[1, 2],key=\"a, b\".")
    return [part for part in (*parts, current) if part.strip()]


def override(table: dict[str, Any], assignment: str) -> None:
    """Apply `section.key=value` to a run file's dictionary, in place.

    In a section with several entries the second part is an entry's name: `loss.l1.weight=2`. What follows the name of a
    variant is a key of its table: `variant.wide.architecture.d_sae=8192`, `variant.wide.loss.l1.weight=2`.
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
            target = target.setdefault(key, [] if position == 0 and key in (*LISTS, "variant") else {})
        if not isinstance(target, (dict, list)):
            raise UsageError(f"-o {assignment}: {'.'.join(keys[: position + 1])} is a value, not a table.")
    if isinstance(target, list):
        raise UsageError(f"-o {assignment}: name a key of the entry, for example {path}.weight=2.")
    target[keys[-1]] = parse_value(text)


def _entry(entries: list[dict[str, Any]], name: str, assignment: str, section: str) -> dict[str, Any]:
    labels = {label_of(entry): entry for entry in entries}
    if name not in labels:
        raise UsageError(
            f"-o {assignment}: the run has no {section} called {name!r}.{near_names(name, labels)} "
            f"It has: {', '.join(labels) or 'none'}."
        )
    return labels[name]


def parse_config(table: Mapping[str, Any], where: str) -> RunConfig:
    """A run file's dictionary as a RunConfig; `where` names the file in errors."""
    check_shape(table, where)
    try:
        _no_odd_text(table)
        for variant in table.get("variant", []):
            check_variant(variant)
        config = _checked(table)
        names = [variant.name.lower() for variant in config.variant]  # some file systems do not tell A from a
        twice = next((v.name for v in config.variant if names.count(v.name.lower()) > 1), None)
        if twice:
            raise UsageError(f'variant: two are called {twice!r}. Give one of them another name: name = "...".')
        for variant in config.variant:
            _checked(changed(config, variant), f"variant.{variant.name}.")
    except UsageError as error:
        raise UsageError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None
    return config


def _checked(table: Mapping[str, Any], within: str = "") -> RunConfig:
    """A table as a RunConfig of which each entry has a name of its own; `within` stands before the keys in errors."""
    try:
        _no_true_for_a_number(table, within)
        config = RunConfig.model_validate(table)
    except ValidationError as error:
        raise UsageError("\n".join(f"{within}{line}" for line in _config_lines(error, table))) from None
    for section in LISTS:
        labels = [entry.label for entry in getattr(config, section)]
        twice = {label for label in labels if labels.count(label) > 1}
        if twice:
            raise UsageError(
                f"{within}{section}: two entries are called {twice.pop()!r}. Give one of them another name: name = \"...\"."
            )
    if any(entry.label == "loss" for entry in config.loss):
        raise UsageError(f'{within}loss.loss: "loss" is what the sum of all losses is called. Give it another name = "...".')
    return config


def _no_odd_text(value: Any, key: str = "") -> None:
    """UsageError for a text that a TOML file or a path cannot hold: half a surrogate pair (which is how a byte that is
    not UTF-8 comes from the command line), or the character 0."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _no_odd_text(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            _no_odd_text(inner, f"{key}.{position}")
    elif isinstance(value, str) and ("\0" in value or value != value.encode("utf-8", "ignore").decode("utf-8")):
        raise UsageError(f"{key}: {value!r} has a character that is no text. Give it in UTF-8, and rename the file if it is one.")


def _no_true_for_a_number(table: Mapping[str, Any], within: str) -> None:
    no_true_for_a_number(RunConfig, table, within.removesuffix("."))
    no_true_for_a_number(TrainingConfig, table.get("training", {}), f"{within}training")
    no_true_for_a_number(EvaluationConfig, table.get("evaluation", {}), f"{within}evaluation")
    no_true_for_a_number(SourceUse, table.get("source", {}), f"{within}source")
    no_true_for_a_number(ArchitectureUse, table.get("architecture", {}), f"{within}architecture")
    no_true_for_a_number(GraphUse, table.get("graph", {}), f"{within}graph")
    for entry in table.get("loss", []):
        no_true_for_a_number(LossUse, entry, f"{within}loss.{label_of(entry)}")


def _config_lines(error: ValidationError, table: Mapping[str, Any]) -> list[str]:
    lines = []
    for problem, line in zip(error.errors(), validation_lines(error, given=table), strict=True):
        *parents, key = problem["loc"] or ("",)
        if problem["type"] == "extra_forbidden":
            known = _keys_at(parents)
            line = f"{line.partition(': ')[0]}: there is no such key.{near_names(str(key), known)} Known: {', '.join(known)}."
        elif problem["type"] == "missing" and problem["loc"] in (("source",), ("architecture",)):
            line = f'{key}: is missing. Add a table [{key}] with use = "..." (see: saekit plugins).'
        lines.append(line)
    return lines


def _keys_at(parents: list[int | str]) -> list[str]:
    """The keys that may stand below `parents` in a run file; the last parent may be the word of a schedule."""
    if not parents:
        return list(RunConfig.model_fields)
    models: dict[str, type[BaseModel]] = {"training": TrainingConfig, "evaluation": EvaluationConfig, "variant": Variant}
    models.update(SCHEDULES)
    return list((models.get(str(parents[-1])) or models[str(parents[0])]).model_fields)


def label_of(entry: Mapping[str, Any]) -> str:
    """The name of an entry of a section, as it stands in a run file's dictionary."""
    return str(entry.get("name") or str(entry.get("use", "")).rpartition(".")[2])


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
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
