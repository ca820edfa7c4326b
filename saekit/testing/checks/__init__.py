"""The conformance checks: one list for each kind of component, each in its own module."""

from __future__ import annotations

import importlib

from saekit.errors import UsageError, near_names
from saekit.kinds import KINDS
from saekit.testing.kit import Check

_MODULES = {
    "loss": "losses",
    "architecture": "architectures",
    "metric": "metrics",
    "analyzer": "analyzers",
    "comparison": "comparisons",
    "callback": "callbacks",
    "source": "sources",
    "tracker": "trackers",
    "graph_builder": "graph_builders",
    "recipe": "recipes",
}
"""The module with the checks of each kind. Each includes those of `any_kind`."""


def checks_of(kind: str) -> tuple[Check, ...]:
    """The checks of a kind, in the order in which they are run. UsageError for an unknown kind."""
    if kind not in _MODULES:
        raise UsageError(f"there is no kind {kind!r}.{near_names(kind, KINDS)} There are: {', '.join(KINDS)}.")
    return importlib.import_module(f"saekit.testing.checks.{_MODULES[kind]}").CHECKS
