"""How a run file is read, and how `-o key=value` and names on the command line change it."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from saekit.config import EvaluationConfig, RunConfig, TrainingConfig, Variant
from saekit.errors import UsageError, near_names
from saekit.files import nested_too_deeply
from saekit.kinds import LISTS, SINGLES
from saekit.options import validation_lines
from saekit.schedules import SCHEDULES
from saekit.variants import changed, check_variant


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dictionary. Every failure is a UsageError that names the file."""
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
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not valid TOML: {error}.") from None


def check_shape(table: Mapping[str, Any], where: str) -> None:
    """UsageError for a section that is not a table, or not a list of tables. Everything that reads a section relies on it."""
    if nested_too_deeply(table):
        raise UsageError(f"{where}: is nested too deeply: no key is more than a few tables and lists down.")
    for section in (*SINGLES, "training", "evaluation"):
        if not isinstance(table.get(section, {}), Mapping):
            keys = "use = \"...\"" if section in SINGLES else "its keys"
            raise UsageError(f"{where}: {section}: is not a table. Write [{section}] and under it {keys}.")
    for section in (*LISTS, "variant"):
        entries = table.get(section, [])
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            keys = 'use = "..."' if section in LISTS else 'name = "..." and what is different'
            raise UsageError(
                f"{where}: {section}: is not a list of tables. Write each entry as [[{section}]], in double brackets, and "
                f"under it {keys}."
            )
    files = table.get("plugins", [])
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise UsageError(f'{where}: plugins: is not a list of files. Write plugins = ["./my_loss.py"].')


def parse_value(text: str) -> Any:
    """A value of `-o key=value`: what it is as TOML, except for dates; otherwise the text itself."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # A date, or a text of several lines that reads as further keys, is a text to whoever typed it.
    return text if len(table) > 1 or isinstance(table["value"], datetime.date | datetime.time) else table["value"]


def parse_use(text: str) -> dict[str, Any]:
    """`NAME[:key=value,...]` of the command line as a table of the run file."""
    name, _, rest = text.partition(":")
    table: dict[str, Any] = {"use": name.strip()}
    for part in _assignments(rest, text):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{text!r}: {part!r} is not key=value; write NAME:key=value,key=value.")
        table[key.strip()] = parse_value(value.strip())
    return table


def _assignments(text: str, whole: str) -> list[str]:
    """`text` split at its commas, except inside a value that begins with a bracket or a quote."""
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


class Override(NamedTuple):
    """One change to a run file. key: such as `training.lr`. where: how the user gave it, for messages."""

    key: str
    value: Any
    where: str


def parse_override(assignment: str) -> Override:
    """`section.key=value` of the command line."""
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"-o {assignment}: write key=value, for example training.lr=1e-3.")
    return Override(key.strip(), parse_value(text), f"-o {assignment}")


def override(table: dict[str, Any], change: Override) -> None:
    """Apply a change to a run file's dictionary, in place.

    In a section with several entries the second part of the key is an entry's name: `loss.l1.weight`. After the name of a
    variant comes a key of its table: `variant.wide.architecture.d_sae`, `variant.wide.loss.l1.weight`.
    """
    keys = change.key.split(".")
    target: Any = table
    for position, key in enumerate(keys[:-1]):
        if isinstance(target, list):
            target = _entry(target, key, keys[position - 1], change.where)
        else:
            target = target.setdefault(key, [] if position == 0 and key in (*LISTS, "variant") else {})
        if not isinstance(target, (dict, list)):
            raise UsageError(f"{change.where}: {'.'.join(keys[: position + 1])} is a value, not a table.")
    if isinstance(target, list):
        raise UsageError(f"{change.where}: name a key of the entry, for example {change.key}.weight=2.")
    target[keys[-1]] = change.value


def _entry(entries: list[dict[str, Any]], name: str, section: str, where: str) -> dict[str, Any]:
    labels = {label_of(entry): entry for entry in entries}
    if name not in labels:
        raise UsageError(
            f"{where}: the run has no {section} called {name!r}.{near_names(name, labels)} "
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
    """A table as a RunConfig, each entry with a different name; `within` is put before the keys in errors."""
    try:
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
    both = {entry.label for entry in config.analyzer} & {entry.label for entry in config.comparison}
    if both:
        raise UsageError(
            f"{within}comparison.{min(both)}: an analyzer has this name too, and both would write to analysis/{min(both)}. Give "
            'one of them another name: name = "...".'
        )
    if any(entry.label == "loss" for entry in config.loss):
        raise UsageError(f'{within}loss.loss: "loss" is what the sum of all losses is called. Give it another name = "...".')
    return config


def _no_odd_text(value: Any, key: str = "") -> None:
    """UsageError for a text that a TOML file or a path cannot hold: half a surrogate pair (a byte on the command line
    that is not UTF-8 becomes one), or the character 0."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _no_odd_text(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            _no_odd_text(inner, f"{key}.{position}")
    elif isinstance(value, str) and ("\0" in value or value != value.encode("utf-8", "ignore").decode("utf-8")):
        raise UsageError(f"{key}: {value!r} has a character that is not text. Give it in UTF-8, and rename the file if it is one.")


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
    """The name of an entry in a run file's dictionary."""
    return str(entry.get("name") or str(entry.get("use", "")).rpartition(".")[2])


def table_of(values: Iterable[str], section: str, table: dict[str, Any]) -> None:
    """Add components given on the command line to a run file's dictionary: to a list, or in place of a single one."""
    for text in values:
        entry = parse_use(text)
        if section in SINGLES:
            keep = {k: v for k, v in table.get(section, {}).items() if section == "architecture" and k == "d_sae"}
            table[section] = {**keep, **entry}
        else:
            table.setdefault(section, []).append(entry)
