"""From what a user names (a recipe, a file, names on the command line, overrides) to a RunConfig and a Registry."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saekit.config import RunConfig
from saekit.errors import PluginError, UsageError
from saekit.plugins import Registry
from saekit.registered import RegisteredComponent
from saekit.run_file import Override, check_shape, override, parse_config, parse_override, read_toml, table_of

_CONTENT = "the run file given as a dictionary"
_FUNCTION_IN_FILE = re.compile(r"(?P<file>.+\.py):(?P<function>\w+)")


@dataclass
class Request:
    """What the user asked for.

    what: a recipe's name, a run file's path, or its content in the types that TOML has.
    uses: for each section, components as `NAME[:key=value,...]`.
    overrides: `key=value` as on the command line, or with a Python value.
    """

    what: str | Mapping[str, Any] | None = None
    uses: Mapping[str, Iterable[str]] = field(default_factory=dict)
    overrides: Iterable[str | Override] = ()
    plugins: Iterable[str] = ()
    no_plugins: Iterable[str] = ()


def compose(request: Request) -> tuple[RunConfig, Registry]:
    """The configuration and the plugins of a new run."""
    files = [str(Path(p).resolve()) for p in request.plugins]
    what = request.what
    path = None if isinstance(what, Mapping) else _file_of(what)
    table = dict(what) if isinstance(what, Mapping) else None if path is None else read_toml(path)
    if table is not None:
        check_shape(table, str(path or _CONTENT))
        place = path.parent if path else Path()
        files += [str((place / p).resolve()) for p in table.get("plugins", [])]
        table = {key: one if key == "source" else _with_functions_beside(one, place) for key, one in table.items()}
    registry = Registry(files=dict.fromkeys(files), disabled=request.no_plugins)
    registry.refuse_broken_files()
    if table is None:
        assert not isinstance(what, Mapping)
        path = recipe_path(_recipe(what, registry))
        table = read_toml(path)
        check_shape(table, str(path))
    if path is not None:
        table.setdefault("recipe", path.stem)
    if files:
        table["plugins"] = list(dict.fromkeys(files))
    for section, values in request.uses.items():
        table_of(values, section, table)
    changes = [parse_override(change) if isinstance(change, str) else change for change in request.overrides]
    for change in changes:
        override(table, change)
    changed = any(list(values) for values in request.uses.values()) or changes
    named = str(path or _CONTENT)
    where = f"{named} with what {'the command line adds' if path else 'overrides change'}" if changed else named
    return parse_config(table, where), registry


def _with_functions_beside(value: Any, directory: Path) -> Any:
    """The table with the absolute path in each "FILE.py:function" that names a file relative to `directory`."""
    if isinstance(value, dict):
        return {key: _with_functions_beside(one, directory) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_functions_beside(one, directory) for one in value]
    named = _FUNCTION_IN_FILE.fullmatch(value) if isinstance(value, str) else None
    if named is None or not (directory / named["file"]).is_file():
        return value
    return f"{(directory / named['file']).resolve()}:{named['function']}"


def _file_of(what: str | None) -> Path | None:
    # A directory that happens to have a recipe's name does not hide the recipe.
    if what is None or not (what.endswith(".toml") or "/" in what or Path(what).is_file()):
        return None
    return Path(what)


def _recipe(name: str | None, registry: Registry) -> RegisteredComponent:
    if name is not None:
        return registry.find("recipe", name)
    for component in registry.components("recipe"):
        if component.default:
            return component
    raise UsageError("No installed plugin offers a default recipe. Name a recipe or a run file (see: saekit recipes).")


def recipe_path(component: RegisteredComponent) -> Path:
    """The file of a recipe, whose target is `package:path/inside/it.toml`."""
    package, _, inside = str(component.target).partition(":")
    try:
        return Path(str(importlib.resources.files(package).joinpath(inside)))
    except Exception as error:
        raise PluginError(f"{component.origin}: its file {component.target!r} cannot be found: {error}") from error
