"""Completion of `saekit run` in the shell: recipes, components and their options, without importing anything heavy.

The options of a component are the keyword-only parameters of its target, read here from the target's source.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click.shell_completion import CompletionItem

from saekit.errors import SaekitError
from saekit.kinds import SECTIONS
from saekit.options import option_parameters
from saekit.plugins import Registry
from saekit.registered import RegisteredComponent

if TYPE_CHECKING:
    import click

def recipes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of recipes; and files, which the shell completes itself."""
    found = [CompletionItem(c.name, help=c.summary) for c in _registry(context).components("recipe")]
    return [item for item in found if item.value.startswith(incomplete)] or [CompletionItem(incomplete, type="file")]


def components(section: str, context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`NAME`, and after a colon `NAME:key=`, with the keys that are not given yet."""
    offered = _registry(context).components(SECTIONS[section].kind)
    name, colon, rest = incomplete.partition(":")
    if not colon:
        return [CompletionItem(c.name, help=c.summary) for c in offered if c.name.startswith(incomplete)]
    found = [c for c in offered if name in (c.name, c.qualified_name)]
    before, _, last = rest.rpartition(",")
    given = {part.partition("=")[0] for part in before.split(",")}
    start = f"{name}:{before}," if before else f"{name}:"
    return [
        CompletionItem(f"{start}{key}=")
        for key in _keys(section, found[0] if found else None)
        if key.startswith(last) and key not in given
    ]


def overrides(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`section.key=`, with the options of the components that the run file names."""
    registry = _registry(context)
    return [CompletionItem(key) for key in _override_keys(context, registry) if key.startswith(incomplete)]


def _registry(context: click.Context) -> Registry:
    try:
        return Registry(files=context.params.get("plugins") or (), disabled=context.params.get("no_plugins") or ())
    except SaekitError:  # a missing file; no message in the middle of a line
        return Registry()


def _keys(section: str, component: RegisteredComponent | None) -> Iterable[str]:
    from saekit.config import use_model

    own = (info.alias or name for name, info in use_model(section).model_fields.items() if name != "use")
    return [*(option_names(component) if component else ()), *own]


def _override_keys(context: click.Context, registry: Registry) -> Iterable[str]:
    from saekit.config import EvaluationConfig, TrainingConfig
    from saekit.run_file import label_of

    for part, model in (("training", TrainingConfig), ("evaluation", EvaluationConfig)):
        yield from (f"{part}.{key}=" for key in model.model_fields)
    table = _table(context, registry)
    for name, section in SECTIONS.items():
        given = table.get(name, [])
        for entry in given if section.many and isinstance(given, list) else [given]:
            if not isinstance(entry, Mapping):
                continue
            offered = registry.components(section.kind)
            found = [c for c in offered if entry.get("use") in (c.name, c.qualified_name)]
            prefix = f"{name}.{label_of(entry)}" if section.many else name
            yield from (f"{prefix}.{key}=" for key in _keys(name, found[0] if found else None))


def _table(context: click.Context, registry: Registry) -> dict[str, Any]:
    """The run file that the line names, or the default recipe's; empty if it cannot be read."""
    from saekit.run_file import read_toml
    from saekit.runner.compose import recipe_path

    # If the line ends with an option without its value, click leaves the words before it in `args`.
    what = context.params.get("what") or next(iter(context.args), None)
    try:
        for component in registry.components("recipe"):
            if component.name == what or (what is None and component.default):
                return read_toml(recipe_path(component))
        return read_toml(Path(what)) if what else {}
    except SaekitError:
        return {}


def option_names(component: RegisteredComponent) -> list[str]:
    """The options of a component, the required ones first, from the source of its target; none if that cannot be read."""
    if not isinstance(component.target, str):
        try:
            return [parameter.name for parameter in option_parameters(component.target, component.origin)]
        except SaekitError:
            return []
    module, _, attribute = component.target.partition(":")
    options = _options_in(module, attribute)
    return sorted(options, key=lambda name: not options[name])


def _options_in(module: str, name: str) -> dict[str, bool]:
    """The keyword-only parameters of what `module` calls `name`, each with whether it is required."""
    _, node = _definition(module, name)
    if isinstance(node, ast.FunctionDef):
        return _keyword_only(node)
    for home, part in _linearised(module, name):
        for method in part.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                return _keyword_only(method)
        if _is_dataclass(part):
            return _fields_of_dataclass(home, part)
    return {}


def _keyword_only(function: ast.FunctionDef) -> dict[str, bool]:
    arguments = function.args
    return {a.arg: default is None for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)}


def _fields_of_dataclass(module: str, node: ast.ClassDef) -> dict[str, bool]:
    """The fields of a dataclass and of those that it is derived from, in the order of its parameters."""
    found: dict[str, bool] = {}
    for _, part in reversed(_linearised(module, node.name)):
        for line in part.body if _is_dataclass(part) else ():
            if isinstance(line, ast.AnnAssign) and not ast.unparse(line.annotation).startswith("ClassVar"):
                required, settings = line.value is None, {}
                if isinstance(line.value, ast.Call) and ast.unparse(line.value.func).endswith("field"):
                    settings = {k.arg: ast.unparse(k.value) for k in line.value.keywords}
                    required = not settings.keys() & {"default", "default_factory"}
                if settings.get("init") != "False":
                    found[ast.unparse(line.target)] = required
    return found


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(
        ast.unparse(decorator).startswith(("dataclass", "dataclasses.dataclass")) for decorator in node.decorator_list
    )


def _linearised(module: str, name: str, depth: int = 8) -> list[tuple[str, ast.ClassDef]]:
    """A class and its bases in the order in which Python searches them, each with the module in which it is written."""
    home, node = _definition(module, name)
    if not isinstance(node, ast.ClassDef) or not depth:
        return []
    bases = [part for base in node.bases for part in _linearised(home, ast.unparse(base), depth - 1)]
    return [(home, node), *reversed(dict.fromkeys(reversed(bases)))]  # a base that two of them share comes after both


def _definition(module: str, name: str, depth: int = 8) -> tuple[str, ast.stmt | None]:
    """The module in which `name` is defined (`module`, or one that it imports the name from), and the definition."""
    tree = _source_tree(module)
    for node in tree.body if tree and depth else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module, alias.name, depth - 1)
    return module, None


@functools.cache
def _source_tree(module: str) -> ast.Module | None:
    """The module's source, parsed; the packages above it are looked through, not imported."""
    top, *below = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for name in below:
            top = f"{top}.{name}"
            spec = PathFinder.find_spec(top, spec.submodule_search_locations) if spec else None
        return ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else None
    except (ImportError, OSError, ValueError, SyntaxError):
        return None
