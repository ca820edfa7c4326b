"""`[[variant]]`: several SAEs on one pass over the activations, each a change to the run file.

With its change applied a variant is a complete run file, and on one machine that run alone trains the same SAE to the
bit. So variants may not differ in anything that decides the activations: all of them see one harvest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saekit.config import VARIES, RunConfig, TrainingConfig, Variant, keys_with
from saekit.errors import UsageError, near_names
from saekit.kinds import LISTS, SINGLES

TABLES = tuple(name for name in (*SINGLES, "training") if name in Variant.model_fields)
OWN_LISTS = tuple(name for name in LISTS if name in Variant.model_fields)
SHARED_SECTIONS = tuple(name for name in (*SINGLES, *LISTS, "evaluation") if name not in Variant.model_fields)
SHARED = tuple(name for name in TrainingConfig.model_fields if name not in keys_with(VARIES, TrainingConfig))
"""Keys of [training] that belong to the data, to the one process, or to the one checkpoint of all variants."""


def run_configs(config: RunConfig) -> dict[str, RunConfig]:
    """The configuration of each SAE that is trained, as if it were trained alone: one for each variant, by its name.
    Without variants it is `config` itself, under the empty name."""
    if not config.variant:
        return {"": config}
    return {variant.name: RunConfig.model_validate(changed(config, variant)) for variant in config.variant}


def check_variant(table: Mapping[str, Any]) -> None:
    """UsageError if a section of a variant has the wrong shape, or names a key that all variants share."""
    where = f"variant.{table.get('name', '?')}"
    for key in TABLES:
        if not isinstance(table.get(key, {}), Mapping):
            raise UsageError(f"{where}.{key}: is not a table. Write {key} = {{key = value}}, or {key}.KEY = value.")
    for key in OWN_LISTS:
        entries = table.get(key, [])
        inside = entries.values() if isinstance(entries, Mapping) else entries
        if not isinstance(entries, Mapping | list) or not all(isinstance(entry, Mapping) for entry in inside):
            raise UsageError(
                f'{where}.{key}: is neither a list of tables nor a table of them. Write {key} = [{{use = "..."}}] in '
                f"place of the run's, or {key}.NAME.KEY = value to change one of them."
            )
    shared = [key for key in SHARED_SECTIONS if key in table]
    shared += [f"training.{key}" for key in SHARED if key in table.get("training", {})]
    if shared:
        raise UsageError(
            f"{where}.{shared[0]}: is the same for all variants, since they are trained in one pass over the same "
            f"activations. Set {shared[0]} of the run file, or make this variant a separate run."
        )


def changed(config: RunConfig, variant: Variant) -> dict[str, Any]:
    """The table of a run file that does what `variant` of `config` does. UsageError for an entry that does not exist."""
    table = config.model_dump(by_alias=True, exclude_none=True)
    del table["variant"], table["comparison"]
    table["architecture"] = _architecture(table["architecture"], variant.architecture)
    if variant.graph:
        run = table.get("graph", {})
        table["graph"] = run | variant.graph if variant.graph.get("use", run.get("use")) == run.get("use") else variant.graph
    table["training"] |= variant.training
    if table["training"]["seed"] != config.training.seed:
        table["training"].setdefault("data_seed", config.training.seed)
    for section in OWN_LISTS:
        change = getattr(variant, section)
        if isinstance(change, list):
            table[section] = change
        elif change is not None:
            labels = [entry.label for entry in getattr(config, section)]
            table[section] = _entries(table[section], labels, change, f"variant.{variant.name}.{section}")
    return table


def _architecture(table: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    if change.get("use", table["use"]) == table["use"]:
        return table | change
    return {key: value for key, value in table.items() if key == "d_sae"} | change


def _entries(
    entries: list[dict[str, Any]], labels: list[str], change: dict[str, dict[str, Any]], key: str
) -> list[dict[str, Any]]:
    for name in change:
        if name not in labels:
            raise UsageError(
                f"{key}.{name}: the run has no {key.rpartition('.')[2]} called {name!r}.{near_names(name, labels)} It has: "
                f'{", ".join(labels) or "none"}. To have others than the run, write the whole list: [{{use = "..."}}].'
            )
    return [entry | change.get(label, {}) for entry, label in zip(entries, labels, strict=True)]
