"""Commands that plugins add to `saekit`: how one is declared, found and loaded."""

from __future__ import annotations

import contextlib
import pkgutil
import re
import sys
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saekit.errors import PluginError, UsageError, near_names

if TYPE_CHECKING:
    import click

    from saekit.plugins import Plugin, Registry

HOOK = "saekit_commands"
_NAME = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Command:
    """A command that a plugin adds.

    name: what the user types after `saekit`.
    target: `"package.module:command"`, a click command, which is imported when the user calls it.
    summary: one line for `saekit --help`.
    """

    name: str
    target: str
    summary: str


def checked(declared: Iterable[Any]) -> Iterator[Command]:
    """What a plugin's hook yields; PluginError for anything that is not a command."""
    for command in declared:
        if not isinstance(command, Command):
            raise PluginError(f"{HOOK} must yield saekit.Command, not {type(command).__name__}.")
        if not isinstance(command.name, str) or not _NAME.fullmatch(command.name):
            raise PluginError(f"{HOOK}: {command.name!r} is not a name for a command; use lower case and dashes.")
        if not isinstance(command.target, str) or not command.target.partition(":")[2]:
            raise PluginError(f"{HOOK}: the target of {command.name!r} must be a string 'package.module:command'.")
        yield command


def load(command: Command, plugin: Plugin) -> click.Command:
    """Import the target. PluginError, with the cause, if that fails or it is not a click command."""
    import click

    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be carrying a JSON document
            target = pkgutil.resolve_name(command.target)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"command {command.name!r} of {plugin.origin} cannot be loaded from {command.target!r}: "
            f"{type(error).__name__}: {error}. Fix or upgrade {plugin.distribution}."
        ) from error
    if not isinstance(target, click.Command):
        raise PluginError(
            f"command {command.name!r} of {plugin.origin}: {command.target!r} is {type(target).__name__}, not a click command. "
            f"Fix or upgrade {plugin.distribution}."
        )
    return target


def offered(registry: Registry) -> dict[str, list[Plugin]]:
    """For each command's name the plugins that declare it."""
    plugins: dict[str, list[Plugin]] = {}
    for plugin in registry.plugins:
        for command in plugin.commands:
            plugins.setdefault(command.name, []).append(plugin)
    return plugins


def summaries(registry: Registry, own: Container[str]) -> dict[str, str]:
    """The summary of each command that can be called: one plugin declares it, and saekit does not."""
    usable = {name for name, plugins in offered(registry).items() if len(plugins) == 1 and name not in own}
    return {c.name: c.summary for p in registry.plugins for c in p.commands if c.name in usable}


def clashes(registry: Registry, own: Container[str]) -> dict[str, str]:
    """For each command name that is declared twice, a sentence that says by which plugins."""
    found = {}
    for name, plugins in offered(registry).items():
        claims = " and ".join(plugin.origin for plugin in plugins)
        if name in own:
            found[name] = f"{claims} declares a command {name!r}, which saekit has itself; saekit's is called."
        elif len(plugins) > 1:
            leave_out = f"SAEKIT_DISABLE_PLUGINS={plugins[0].name}"
            found[name] = f"{claims} both declare a command {name!r}. Uninstall one of them, or set {leave_out}."
    return found


def find(name: str, registry: Registry, own: Iterable[str]) -> click.Command:
    """The plugin's command that the user typed. UsageError or PluginError if there is none that can be called."""
    if name in (clash := clashes(registry, ())):
        raise UsageError(clash[name])
    for plugin in registry.plugins:
        for command in plugin.commands:
            if command.name == name:
                return load(command, plugin)
    near = near_names(name, [*own, *offered(registry)])
    broken = [f"{p.origin} failed to load: {p.error} {p.fix}" for p in registry.plugins if p.error]
    if broken:
        raise PluginError(f"There is no command {name!r}, but {' '.join(broken)}{near}")
    raise UsageError(f"There is no command {name!r}.{near}")
