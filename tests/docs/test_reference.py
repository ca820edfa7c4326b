"""What the code offers is documented, and what is generated from it is up to date."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
from pydantic import BaseModel

import saekit
from saekit import protocols
from saekit.cli import cli
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
from saekit.errors import ExitCode
from saekit.hookspecs import Declaring, Lifecycle
from saekit.kinds import HOOKS, KINDS
from saekit.plugins import Registry
from saekit.schedules import SCHEDULES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MODELS = [
    RunConfig, Use, SourceUse, ArchitectureUse, LossUse, GraphUse, TrainingConfig, EvaluationConfig, Variant, *SCHEDULES.values()
]  # fmt: skip
COMPONENTS = [pytest.param(c, id=f"{c.kind}-{c.name}") for c in Registry().components() if c.kind != "recipe"]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_tables_are_up_to_date() -> None:
    tables = script("tables")
    known = tables.tables()
    stale = [name for name in tables.PAGES if tables.rewritten(page(name), known) != page(name)]
    assert stale == [], "run: make docs"
    used = {name for path in tables.PAGES for name in re.findall(r"<!-- table: ([a-z-]+) -->", page(path))}
    assert used == set(known)


def test_fields_of_docstrings_become_lists() -> None:
    import doctest

    assert doctest.testmod(script("fields")).failed == 0


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_and_its_options_are_described(component) -> None:
    """By a summary for listings, a docstring for `plugins show`, and a description of each option."""
    assert component.summary.endswith(".")
    assert inspect.getdoc(component.load())
    silent = [name for name, field in component.options_model().model_fields.items() if not field.description]
    assert silent == []


def test_every_component_is_on_the_page_of_components() -> None:
    text = page("docs/components.md")
    assert [c.qualified_name for c in Registry().components() if f"### `{c.name}`\n" not in text] == []


def test_every_value_of_every_metric_is_defined_on_its_page() -> None:
    text = page("docs/metrics.md")
    for component in Registry().components("metric"):
        assert f"`{component.name}`" in text
        assert [value for value in getattr(component.load(), "meanings", {}) if f"`{value}`" not in text] == []


def test_every_component_is_in_the_changelog() -> None:
    text = page("CHANGELOG.md")
    named = {"architecture", "metric", "analyzer", "callback", "source", "tracker"}
    assert [c.name for c in Registry().components() if c.kind in named and f"`{c.name}`" not in text] == []


def test_first_party_plugins_are_all_installed() -> None:
    """Otherwise the tables would silently leave their components out."""
    declared = {
        name
        for path in [ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")]
        for name in tomllib.loads(path.read_text(encoding="utf-8"))["project"]["entry-points"]["saekit"]
    }
    plugins = {plugin.name: plugin for plugin in Registry().plugins}
    assert declared <= set(plugins)
    assert {name: plugins[name].error for name in declared if plugins[name].error} == {}


def test_requirements_install_every_package_of_the_repository() -> None:
    listed = re.findall(r"^-e (\S+)$", page("requirements.txt"), re.MULTILINE)
    packages = [".", *(f"./{path.parent.relative_to(ROOT)}" for path in sorted(ROOT.glob("plugins/*/pyproject.toml")))]
    assert sorted(listed) == sorted(packages)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_key_of_a_run_file_is_described_and_on_its_page(model: type[BaseModel]) -> None:
    text = page("docs/run-file.md")
    for name, field in model.model_fields.items():
        if name == "schedule":  # the word that chooses the schedule is the heading
            assert f"### `{field.annotation.__args__[0]}`" in text
            continue
        assert field.description, f"{model.__name__}.{name} has no description"
        assert f"| `{field.alias or name}` |" in text


@pytest.mark.parametrize("family", [Declaring, Lifecycle], ids=lambda family: family.__name__)
def test_every_hook_has_a_docstring(family: type) -> None:
    hooks = [name for name in vars(family) if not name.startswith("_")]
    assert hooks
    assert [name for name in hooks if not inspect.getdoc(getattr(family, name))] == []
    if family is Declaring:
        assert set(hooks) == {*HOOKS.values(), "saekit_commands"}


def test_every_lifecycle_hook_is_in_the_order_that_the_page_tells() -> None:
    text = page("docs/hooks.md")
    assert [name for name in vars(Lifecycle) if not name.startswith("_") and f"`{name}`" not in text] == []


def table_on_hooks(head: str) -> set[str]:
    """The names in the first column of a table of docs/hooks.md."""
    table = page("docs/hooks.md").partition(f"\n| {head} |")[2].partition("\n\n")[0]
    return {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize(("argument", "given"), [("run", protocols.RunInfo), ("trainer", protocols.Training)])
def test_every_attribute_of_what_hooks_hand_over_is_in_its_table_and_described(argument: str, given: type) -> None:
    attributes = {*given.__annotations__, *(name for name in vars(given) if not name.startswith("_"))}
    assert table_on_hooks(f"attribute of `{argument}`") == attributes
    source = ast.parse(inspect.getsource(given)).body[0]
    assert isinstance(source, ast.ClassDef)
    described = {
        before.target.id
        for before, after in itertools.pairwise(source.body)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }  # fmt: skip
    assert described == set(given.__annotations__)


def test_every_argument_of_a_hook_is_in_the_table_of_the_page() -> None:
    listed = table_on_hooks("argument")
    taken = {
        argument
        for family in (Declaring, Lifecycle)
        for name, hook in vars(family).items()
        if not name.startswith("_")
        for argument in inspect.signature(hook).parameters
    }
    assert listed == taken - {"self"}


def test_the_page_of_a_run_says_where_each_kind_and_each_hook_comes_in() -> None:
    text = "\n".join(re.findall(r"^\| [\w ]+ \| (.*) \|$", page("docs/architecture.md"), re.MULTILINE))
    assert [kind for kind in KINDS if not re.search(rf"\b{kind}\b", text)] == []
    assert [name for name in vars(Lifecycle) if not name.startswith("_") and f"`{name}`" not in text] == []


def test_every_kind_is_on_the_page_of_plugins_and_every_method_of_a_protocol_is_described() -> None:
    text = page("docs/plugins.md")
    assert [kind for kind, hook in HOOKS.items() if f"\n| {kind} | `{hook}` |" not in text] == []
    classes = [c for c in vars(protocols).values() if inspect.isclass(c) and c.__module__ == protocols.__name__]
    methods = [
        function
        for one in classes
        for function in vars(one).values()
        if inspect.isfunction(function) and function.__module__ == protocols.__name__
    ]
    assert len(classes) > 4 and len(methods) > 10
    assert [thing.__qualname__ for thing in (*classes, *methods) if not inspect.getdoc(thing)] == []


def commands(group: click.Group, name: str = "saekit") -> Iterator[tuple[str, click.Command]]:
    """Every command below a group, by what is typed for it."""
    context = click.Context(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        assert command is not None
        yield f"{name} {word}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {word}")


def test_every_command_and_every_option_of_it_says_what_it_is_for() -> None:
    silent = [
        f"{name} {parameter.opts[0]}"
        for name, command in commands(cli)
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.help
    ]
    assert silent == []
    assert [name for name, command in commands(cli) if not command.help] == []


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    text = page("docs/api.md")
    shown = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    shown |= set(re.findall(r"`saekit\.(\w+)`", text))
    assert [name for name in saekit.__all__ if name not in shown] == []


def test_every_public_name_has_a_docstring() -> None:
    silent = [name for name in saekit.__all__ if name != "hookimpl" and not inspect.getdoc(getattr(saekit, name))]
    assert silent == []


def test_every_exit_code_and_every_command_is_documented() -> None:
    files = page("docs/files.md")
    assert [code for code in ExitCode if f"| {int(code)} |" not in files] == []
    everything = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    assert [name for name, _ in commands(cli) if name not in everything] == []


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads(page("pyproject.toml"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    listed = re.findall(r"^([A-Za-z][\w.-]*)", page("requirements-dev.txt"), re.MULTILINE)
    names = {re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0] for line in [*project["dependencies"], *extras, *listed]}
    text = page("docs/dependencies.md")
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_the_changelog_has_an_unreleased_section_or_this_version() -> None:
    version = tomllib.loads(page("pyproject.toml"))["project"]["version"]
    text = page("CHANGELOG.md")
    assert "## [Unreleased]" in text or f"## [{version}]" in text
