"""`saekit plugins`: what is installed, and the options of one component."""

from __future__ import annotations

from typing import Any

import click

from saekit.errors import UsageError, near_names
from saekit.kinds import KINDS
from saekit.plugins import Plugin, Registry
from saekit.registered import RegisteredComponent
from saekit.terminal.output import echo, echo_json, listed, wrapped


@click.group("plugins", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--requirements", is_flag=True, help="Print what is installed as lines for pip.")
@click.option("--plugin", "files", multiple=True, metavar="FILE.py", help="Load a Python file as a plugin.")
@click.pass_context
def command(context: click.Context, as_json: bool, requirements: bool, files: tuple[str, ...]) -> None:
    """List the installed components by kind, and plugins that failed to load with their errors."""
    registry = Registry(files=files)
    context.obj = registry
    if context.invoked_subcommand is not None:
        return
    if requirements:
        lines = sorted({f"{p.distribution}=={p.version}" for p in registry.plugins if p.file is None})
        if as_json:
            echo_json(lines)
        else:
            echo("\n".join(lines))
    elif as_json:
        echo_json(_listing(registry))
    else:
        _print_listing(registry)


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def show(registry: Registry, name: str, as_json: bool) -> None:
    """Show one component: its options with types, defaults and meaning, its needs, and where it comes from."""
    kind, _, rest = name.partition(":")
    found = [c for c in registry.components() if name in (c.name, c.qualified_name)]
    if not found and kind in KINDS:
        found = [c for c in registry.components(kind) if rest in (c.name, c.qualified_name)]
    if not found:
        names = [c.name for c in registry.components()]
        raise UsageError(f"There is no component {name!r}.{near_names(name, names)} See: saekit plugins")
    described = [describe(c, registry) for c in found]
    if as_json:
        echo_json(described)
        return
    for entry in described:
        _print_component(entry)


def describe(component: RegisteredComponent, registry: Registry) -> dict[str, Any]:
    """Everything about one component as plain values."""
    import inspect

    options: list[dict[str, Any]] = []
    doc = component.summary
    if component.kind != "recipe":
        doc = inspect.getdoc(component.load()) or component.summary
        schema = component.options_model().model_json_schema()
        for name, field in component.options_model().model_fields.items():
            entry = {
                "name": name,
                "type": _type_name(field.annotation),
                "required": field.is_required(),
                "default": None if field.is_required() else schema["properties"][name].get("default"),
                "description": field.description or "",
            }
            options.append(entry)
    return {
        "kind": component.kind,
        "name": component.name,
        "qualified_name": component.qualified_name,
        "distribution": component.distribution,
        "version": component.version,
        "source": _source(component, registry),
        "summary": component.summary,
        "doc": doc,
        "options": options,
        "needs": {need: [c.qualified_name for c in registry.components() if need in c.provides] for need in component.needs},
        "provides": list(component.provides),
    }


def _source(component: RegisteredComponent, registry: Registry) -> str:
    """Where the target is: `package.module:Object`, or the file that was given."""
    files = [str(p.file) for p in registry.plugins if p.file and p.name == component.plugin]
    return component.target if isinstance(component.target, str) else files[0]


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _listing(registry: Registry) -> dict[str, Any]:
    return {
        "plugins": [
            {
                "name": p.name,
                "distribution": p.distribution,
                "version": p.version,
                "contract": p.contract,
                "error": p.error,
                "fix": p.fix if p.error else None,
                "warnings": p.warnings,
                "imports": p.heavy,
                "disabled": p.disabled,
                "components": [{"kind": c.kind, "name": c.name, "summary": c.summary} for c in p.components],
            }
            for p in registry.plugins
        ],
        "warnings": registry.warnings,
    }


def _print_listing(registry: Registry) -> None:
    kind_before = None
    for component in registry.components():
        if component.kind != kind_before:
            echo(f"\n{component.kind.replace('_', ' ')}", bold=True)
            kind_before = component.kind
        origin = f"{component.distribution} {component.version}"
        echo(listed(component.name, component.summary, origin, indent="  "))
    for plugin in registry.plugins:
        if plugin.disabled:
            echo(f"\ndisabled: {plugin.name} ({plugin.distribution} {plugin.version})")
        if plugin.error:
            echo(f"\nfailed to load: {plugin.name} ({plugin.distribution} {plugin.version})", fg="red")
            echo(f"  {plugin.error}\n  {plugin.fix}")
        for message in notes(plugin):
            echo(f"\nwarning: {plugin.origin}: {message}")
    for warning in registry.warnings:
        echo(f"\nwarning: {warning}", err=True)


def notes(plugin: Plugin) -> list[str]:
    """What the author of a plugin that loads should know about it."""
    if not plugin.heavy:
        return plugin.warnings
    slow = f"imports {', '.join(plugin.heavy)} whenever names are listed. Move what needs it into the module of the target."
    return [*plugin.warnings, slow]


def _print_component(entry: dict[str, Any]) -> None:
    echo(f"{entry['kind']} {entry['name']}", bold=True)
    echo(f"from {entry['distribution']} {entry['version']}, in full {entry['qualified_name']}, source {entry['source']}\n")
    echo(entry["doc"] + "\n")
    for option in entry["options"]:
        default = "required" if option["required"] else f"default {option['default']!r}"
        echo(wrapped(f"{option['name']} ({option['type']}, {default})", "  ", "    "))
        if option["description"]:
            echo(wrapped(option["description"], "      ", "      "))
    for need, providers in entry["needs"].items():
        echo(f"\nneeds {need!r}: provided by {', '.join(providers) or 'nothing installed'}")
    if entry["provides"]:
        echo(f"\nprovides {', '.join(entry['provides'])}")
