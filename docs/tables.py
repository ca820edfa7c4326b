"""Writes the generated tables of the documentation and of README.md: `python docs/tables.py`, or `make docs`.

A table stands between `<!-- table: NAME -->` and `<!-- /table -->` and is made from the code, so that it cannot say
what is not so; tests/docs checks that every page holds what this script would write.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import saekit
import saekit.testing
from saekit.cli import COMMANDS
from saekit.cli.new import KINDS_WITH_TEMPLATES, package_files
from saekit.compatibility import CHANGES
from saekit.component_option import ComponentOption
from saekit.config import (
    ArchitectureUse,
    EvaluationConfig,
    GraphUse,
    LossUse,
    RunConfig,
    SourceUse,
    TrainingConfig,
    Use,
    Variant,
)
from saekit.kinds import HOOKS, KINDS
from saekit.plugin_commands import summaries
from saekit.plugins import Registry
from saekit.registered import OWN_DISTRIBUTION, RegisteredComponent
from saekit.schedules import SCHEDULES
from saekit.testing import Check, checks_of
from saekit.testing.checks import any_kind, commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/run-file.md",
    "docs/components.md",
    "docs/api.md",
    "docs/compatibility.md",
    "docs/kinds.md",
    "docs/write-a-loss.md",
    "docs/testing.md",
)


def homes(package: types.ModuleType) -> dict[str, str]:
    """The public names of a package, in order, each with the module that its stub takes it from."""
    stub = ast.parse(Path(str(package.__file__)).with_suffix(".pyi").read_text(encoding="utf-8"))
    froms = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return dict(sorted((alias.name, f"{package.__name__}.{node.module}") for node in froms for alias in node.names))


API = {
    "Running": ("saekit.api", "saekit.online"),
    "Plugins": (
        "saekit.component", "saekit.component_option", "saekit.hookspecs", "saekit.plugins", "saekit.plugin_commands",
        "saekit.protocols", "saekit.compatibility",
    ),
    "In a run": ("saekit.training", "saekit.runner", "saekit.result"),
    "The SAE and its code": ("saekit.sae",),
    "Feature graphs": ("saekit.graph",),
    "Interventions": ("saekit.interventions", "saekit.numerics"),
    "Activations": ("saekit.activations",),
    "Examples": ("saekit.examples",),
    "Effects and intervals": ("saekit.controls", "saekit.estimate", "saekit.intervals", "saekit.ranks"),
    "Files": ("saekit.files", "saekit.report"),
    "Errors": ("saekit.errors", "saekit.out_of_memory"),
    "Testing": ("saekit.testing",),
}
"""The sections of the API page, with the modules whose public names stand in each."""
MORE = {
    "Running": ("saekit.api.FinishedRun",),
    "Testing": tuple(f"{home}.{name}" for name, home in homes(saekit.testing).items()),
    "Errors": tuple(f"saekit.errors.{name}" for name in ("RunError", "PluginError", "Interrupted", "ExitCode")),
}
"""What the API page shows besides `saekit.__all__`."""
_TABLE = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

def tables() -> dict[str, str]:
    """Every generated table by name."""
    registry = Registry()
    return {
        "run-file": _fields(RunConfig),
        "use": _fields(Use),
        "source": _fields(SourceUse, without=Use),
        "architecture": _fields(ArchitectureUse, without=Use),
        "loss": _fields(LossUse, without=Use),
        "graph": _fields(GraphUse, without=Use),
        "training": _fields(TrainingConfig),
        "evaluation": _fields(EvaluationConfig),
        "variant": _fields(Variant),
        "schedules": "\n".join(_schedule(word, model) for word, model in SCHEDULES.items()),
        "components": _components(registry),
        "component-details": "\n".join(_details(registry)),
        "commands": _table(
            ("command", "what it does"),
            ((f"`saekit {n}`", what) for n, what in {**COMMANDS, **summaries(registry, COMMANDS)}.items()),
        ),
        "api": "\n".join(_api()),
        "contract": _table(("version", "what it changed"), ((str(n), what) for n, what in CHANGES.items())),
        "checks": "\n".join(_checks()),
        **{f"new-{kind.replace('_', '-')}": _written(kind, f"src/saekit_mine/{kind}.py") for kind in KINDS_WITH_TEMPLATES},
        "new-hooks": _written("loss", "src/saekit_mine/__init__.py"),
        "new-test": _written("loss", "tests/test_mine.py"),
        "new-pyproject": _written("loss", "pyproject.toml"),
    }


def rewritten(text: str, known: dict[str, str]) -> str:
    """A page with its tables generated again. KeyError for an unknown table."""
    return _TABLE.sub(lambda found: f"{found[1]}{known[found['name']]}{found[3]}", text)


def _written(kind: str, path: str) -> str:
    """A file that `saekit new KIND mine` writes, as a block of code."""
    language = {"py": "python"}.get(path.rpartition(".")[2], "toml")
    # The module of the hooks names a target that is nowhere but in the package.
    reason = "<!-- not run: a file of the package; tests/packaging installs it -->\n" if path.endswith("__init__.py") else ""
    return f'{reason}```{language} title="{path}"\n{package_files(kind, "mine")[path]}```\n'


def _fields(model: type[BaseModel], without: type[BaseModel] | None = None) -> str:
    """The fields of a model as a table; `without`: leave out the fields of this parent."""
    left_out = without.model_fields if without else {}
    rows = [(name, info) for name, info in model.model_fields.items() if name not in left_out]
    return _table(
        ("key", "value", "default", "meaning"),
        ((f"`{info.alias or name}`", type_text(info), _default(info), info.description or "") for name, info in rows),
    )


def _schedule(word: str, model: type[BaseModel]) -> str:
    rows = [(name, info) for name, info in model.model_fields.items() if name != "schedule"]
    return f"### `{word}`\n\n{inspect.getdoc(model)}\n\n" + _table(
        ("key", "value", "default", "meaning"),
        ((f"`{name}`", type_text(info), _default(info), info.description or "") for name, info in rows),
    )


def _components(registry: Registry) -> str:
    """One row a kind, with the names of what is there; what does not come with the core says what it comes with."""
    rows = []
    for kind in KINDS:
        names = [
            f"`{c.name}`" + (f" ({c.distribution})" if c.distribution != OWN_DISTRIBUTION else "")
            for c in registry.components(kind)
        ]
        if names:
            rows.append((kind.replace("_", " "), ", ".join(names)))
    return _table(("kind", "there are now"), rows)


def _details(registry: Registry) -> Iterable[str]:
    """A section a kind, and in it one a component: its docstring, its options, its needs."""
    for kind in KINDS:
        components = registry.components(kind)
        if components:
            title = HOOKS[kind].removeprefix("saekit_").replace("_", " ").capitalize()
            yield f"## {title}\n"
            yield from map(_detail, components)


def _detail(component: RegisteredComponent) -> str:
    doc = component.summary if component.kind == "recipe" else inspect.getdoc(component.load()) or component.summary
    facts = [f"From `{component.distribution}`."]
    if component.default:
        facts.append(_JOINS[component.kind == "recipe"])
    if component.needs:
        facts.append(f"Needs {_words(component.needs)}.")
    if component.provides:
        facts.append(f"Provides {_words(component.provides)}.")
    if component.kind == "recipe":
        options = f"`saekit recipes {component.name}` prints it.\n"
    else:
        options = _fields(component.options_model()) if component.options_model().model_fields else "It has no options.\n"
    return f"### `{component.name}`\n\n{doc}\n\n{' '.join(facts)}\n\n{options}"


_JOINS = (
    "Joins every run that can hold it, unless the run file says `defaults = false`.",
    "It is what `saekit run` does without an argument.",
)


def _api() -> Iterable[str]:
    """A section a part of the core, and in it each public name, for mkdocstrings to fill."""
    home = homes(saekit)
    left = set(home)
    for title, modules in API.items():
        names = [n for n in home if home[n].startswith(modules)]
        left.difference_update(names)
        if names or title in MORE:
            yield f"## {title}\n"
            for name in names:
                yield f"{_ON_HOOKS[name]}: see [Hooks](hooks.md).\n" if name in _ON_HOOKS else f"::: {home[name]}.{name}\n"
            yield from (f"::: {path}\n" for path in MORE.get(title, ()))
    if left:
        raise KeyError(f"tables.py: say in API on which section of the page {sorted(left)} belong")


_ON_HOOKS = {
    "hookimpl": "`saekit.hookimpl` marks the implementation of a hook",
    "RunInfo": "`saekit.RunInfo` is what a listener is told about its run",
    "Training": "`saekit.Training` is a listener's view of an SAE in training",
}


def type_text(info: FieldInfo) -> str:
    """What a value may be, in words a run file's author knows."""
    limits = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [f"{sign} {getattr(m, name):g}" for name, sign in limits.items() for m in info.metadata if hasattr(m, name)]
    return ", ".join([_type(info.annotation), *found])


def _type(annotation: Any) -> str:
    plain = {bool: "true or false", int: "integer", float: "number", str: "text"}
    if annotation in plain:
        return plain[annotation]
    if annotation is ComponentOption:
        return "name, or table with `use`"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "table" if annotation not in SCHEDULES.values() else "schedule"
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inside[0])
    if origin is typing.Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in inside)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in inside if a is not type(None)))
    if origin is list:
        return f"list of {_type(inside[0])}{'s' if _type(inside[0]) in ('table', 'integer', 'number') else ''}"
    if origin is dict:
        return "table"
    if origin is tuple:
        return f"list of {len(inside)} {_type(inside[0])}s"
    raise TypeError(f"tables.py: say in words what a run file may hold for {annotation}")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "**required**"
    value = info.get_default(call_default_factory=True)
    if value is None:
        return "not set"
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"`{value:_}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value)}`"


def _checks() -> Iterable[str]:
    """A table of the checks that every component is asked, and one a kind of those that only it is."""
    every = [check.name for check in any_kind.CHECKS]
    yield "### Every kind\n\n" + _asked(any_kind.CHECKS)
    for kind in KINDS:
        own = [check for check in checks_of(kind) if check.name not in every]
        if own:
            yield f"### {HOOKS[kind].removeprefix('saekit_').replace('_', ' ').capitalize()}\n\n" + _asked(own)
    yield "### Commands\n\n" + _asked(check for check in commands.CHECKS if check.name not in every)


def _asked(checks: Iterable[Check]) -> str:
    return _table(("check", "what it asks"), ((f"`{check.name}`", check.summary) for check in checks))


def _words(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def main() -> int:
    """Write every page whose tables have changed."""
    known = tables()
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = rewritten(before, known)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
