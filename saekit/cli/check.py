"""`saekit check`: the conformance checks on one component, or on all of a plugin."""

from __future__ import annotations

from typing import Any

import click

from saekit.errors import PluginError, UsageError, near_names
from saekit.kinds import KINDS
from saekit.plugins import Registry
from saekit.registered import RegisteredComponent
from saekit.run_file import override, parse_override
from saekit.terminal.output import echo, echo_json


@click.command("check")
@click.argument("name")
@click.option("-o", "assignments", multiple=True, metavar="KEY=VALUE", help="An option of the component.")
@click.option("--kind", type=click.Choice(KINDS), help="Which kind, if several have the name.")
@click.option("--plugin", "files", multiple=True, metavar="FILE.py", help="Load a Python file as a plugin.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(name: str, assignments: tuple[str, ...], kind: str | None, files: tuple[str, ...], as_json: bool) -> None:
    """Check whether a component, a command, or everything that a plugin declares keeps the contract of its kind.

    Exit code 3 if a check fails. Components of a plugin that cannot do without an option are left out, with a note:
    check them by their own name, with -o.
    """
    from saekit.testing.checks.commands import check_command

    registry = Registry(files=files)
    registry.refuse_broken_files()
    options: dict[str, Any] = {}
    for assignment in assignments:
        override(options, parse_override(assignment))
    added = [(c, p) for p in registry.plugins for c in p.commands if name in (c.name, p.name) and kind is None]
    components, whole_plugin = _meant(name, kind, registry, bool(added))
    if whole_plugin and options:
        raise UsageError(f"-o {assignments[0]}: is an option of one component, but {name!r} is a plugin. Name the component.")
    reports = []
    for component in components:
        required = _required(component) - options.keys()
        if whole_plugin and required:
            ask = f"saekit check {component.qualified_name} -o {sorted(required)[0]}=..."
            echo(f"{component.origin}\n  left out: it needs options. Check it by itself: {ask}", err=True)
            continue
        reports.append(_checked(component, options, registry))
    reports += [check_command(one, plugin, registry) for one, plugin in added]
    for report in reports if not as_json else ():
        _print(report)
    if as_json:
        echo_json([report.to_json() for report in reports])
    _raise_for(reports)


def _meant(name: str, kind: str | None, registry: Registry, is_command: bool) -> tuple[list[RegisteredComponent], bool]:
    """The components that `name` stands for, and whether it is the name of a plugin."""
    named = [c for c in registry.components(kind) if name in (c.name, c.qualified_name)]
    kinds = list(dict.fromkeys(c.kind for c in named))
    if len(kinds) > 1:
        raise UsageError(f"{name!r} is the name of {' and of '.join(f'a {k}' for k in kinds)}. Say which: --kind {kinds[0]}")
    if kinds:
        return [registry.find(kinds[0], name)], False
    plugin = next((p for p in registry.plugins if p.name == name), None)
    if plugin is None and is_command:
        return [], False
    if plugin is None:
        names = [*(c.name for c in registry.components(kind)), *(p.name for p in registry.plugins)]
        raise UsageError(f"There is no component or plugin {name!r}.{near_names(name, names)} See: saekit plugins")
    if plugin.error:
        raise PluginError(f"plugin {name!r} ({plugin.distribution} {plugin.version}) does not load: {plugin.error} Fix it.")
    components = [c for c in plugin.components if kind in (None, c.kind)]
    if not components and not is_command:
        raise UsageError(f"Plugin {name!r} offers no {kind or 'component'}. See: saekit plugins")
    return components, True


def _required(component: RegisteredComponent) -> set[str]:
    if component.kind == "recipe":
        return set()
    try:
        return {name for name, info in component.options_model().model_fields.items() if info.is_required()}
    except PluginError:  # its own check says so
        return set()


def _checked(component: RegisteredComponent, options: dict[str, Any], registry: Registry) -> Any:
    from saekit.testing import check

    return check(component.kind, component.qualified_name, options=options, registry=registry)


def _print(report: Any) -> None:
    echo(report.component.origin, bold=True)
    colours = {"passed": "green", "failed": "red", "expected": "yellow", "skipped": "yellow"}
    for outcome in report.outcomes:
        echo(f"  {outcome.status:<8}", nl=False, fg=colours[outcome.status])
        told = outcome.message and outcome.status != "failed"  # why a check failed is said once, in the error at the end
        echo(f" {outcome.check}" + (f": {outcome.message}" if told else ""))


def _raise_for(reports: list[Any]) -> None:
    """PluginError that says each cause once, with its component and distribution, every check that it failed, and the fix."""
    causes: dict[tuple[str, str], list[str]] = {}
    for report in reports:
        for failure in report.failures:
            causes.setdefault((report.component.origin, failure.message), []).append(failure.check)
    lines = [f"{origin}: {', '.join(checks)}: {message}" for (origin, message), checks in causes.items()]
    if lines:
        raise PluginError("\n".join(lines))
