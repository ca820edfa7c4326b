"""What is asked of a command that a plugin adds."""

from __future__ import annotations

import tempfile
from pathlib import Path

from saekit import plugin_commands
from saekit.plugins import Plugin, Registry
from saekit.registered import RegisteredComponent
from saekit.testing.checks import any_kind
from saekit.testing.kit import Check, Failed, Report, Subject, carry_out


def check_command(command: plugin_commands.Command, plugin: Plugin, registry: Registry) -> Report:
    """Run every check on a command of a plugin."""
    declared = RegisteredComponent(
        command.name,
        command.target,
        command.summary,
        kind="command",
        plugin=plugin.name,
        distribution=plugin.distribution,
        version=plugin.version,
        registry=registry,
    )
    with tempfile.TemporaryDirectory(prefix="saekit-check-") as place:
        subject = Subject(declared, {}, registry, Path(place))
        return Report(declared, [carry_out(check, subject, {}) for check in CHECKS])


def shows_its_help(subject: Subject) -> None:
    from click.testing import CliRunner

    declared = subject.component
    plugin = next(plugin for plugin in subject.registry.plugins if plugin.name == declared.plugin)
    target = plugin_commands.load(plugin_commands.Command(declared.name, str(declared.target), declared.summary), plugin)
    done = CliRunner().invoke(target, ["--help"])
    if done.exit_code:
        raise Failed(f"`saekit {declared.name} --help` ends with exit code {done.exit_code}: {done.exception!r}. Fix the command.")
    if not target.help:
        raise Failed(f"`saekit {declared.name} --help` does not say what it does. Give the function a docstring.")


CHECKS: tuple[Check, ...] = (
    *(check for check in any_kind.CHECKS if check.name in ("has_summary", "light_to_declare")),
    Check("shows_its_help", "Its target is a click command with a description, and `--help` runs.", shows_its_help),
)
