"""`[[variant]]`: other SAEs on the same pass over the activations, each a change to the run file that it stands in.

A variant with its change made is a run file of its own, and on one machine that run alone trains the same SAE to the
bit. So nothing that decides the activations may differ between variants: they all see one harvest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from saekit.errors import UsageError, near_names

if TYPE_CHECKING:
    from saekit.config import RunConfig

Entries = list[dict[str, Any]] | dict[str, dict[str, Any]] | None
"""A list in place of the run's, or keys of its entries by the entries' names: `loss.l1.weight = 2`."""


class Variant(BaseModel):
    """One SAE of several; what it does not name is as the run file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    name: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$",  # it names a directory, and stands in keys that are divided by dots
        max_length=100,
        description="What it is called, and its directory under `variants/`.",
    )
    architecture: dict[str, Any] = Field(
        default_factory=dict, description="Keys of `[architecture]`; with another `use` only `d_sae` is taken over."
    )
    graph: dict[str, Any] = Field(
        default_factory=dict, description="Keys of `[graph]`; with another `use` nothing is taken over."
    )
    training: dict[str, Any] = Field(
        default_factory=dict, description="Keys of `[training]`, but for those that all variants share."
    )
    loss: Entries = Field(default=None, description="Losses in place of the run's, or keys of them by name.")
    callback: Entries = Field(default=None, description="The same for callbacks.")
    metric: Entries = Field(default=None, description="The same for metrics.")
    analyzer: Entries = Field(default=None, description="The same for analyzers.")
    tracker: Entries = Field(default=None, description="The same for trackers.")


TABLES = ("architecture", "graph", "training")
LISTS = tuple(name for name in Variant.model_fields if name not in ("name", *TABLES))

SHARED_SECTIONS = ("source", "evaluation")
SHARED = (
    "tokens", "batch_size", "sequences", "normalize", "data_seed", "buffer", "prefetch",
    "device", "threads", "checkpoint_every", "keep_checkpoints",
)  # fmt: skip
"""Keys of [training] that belong to the data, to the one process, or to the one checkpoint of all variants."""


def check_variant(table: Mapping[str, Any]) -> None:
    """UsageError where a variant's table has a section of the wrong shape, or a key that all variants share."""
    where = f"variant.{table.get('name', '?')}"
    for key in TABLES:
        if not isinstance(table.get(key, {}), Mapping):
            raise UsageError(f"{where}.{key}: is not a table. Write {key} = {{key = value}}, or {key}.KEY = value.")
    for key in LISTS:
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
            f"activations. Set {shared[0]} of the run file, or make this variant a run of its own."
        )


def changed(config: RunConfig, variant: Variant) -> dict[str, Any]:
    """The table of a run file that does what `variant` of `config` does; UsageError for an entry that is not there."""
    table = config.model_dump(by_alias=True, exclude_none=True)
    del table["variant"]
    table["architecture"] = _architecture(table["architecture"], variant.architecture)
    if variant.graph:
        run = table.get("graph", {})
        table["graph"] = run | variant.graph if variant.graph.get("use", run.get("use")) == run.get("use") else variant.graph
    table["training"] |= variant.training
    if table["training"]["seed"] != config.training.seed:
        table["training"].setdefault("data_seed", config.training.seed)
    for section in LISTS:
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
