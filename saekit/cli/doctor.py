"""`saekit doctor`: whether this installation is in order, and what to do if it is not."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from saekit.cli import COMMANDS
from saekit.errors import ExitCode
from saekit.plugin_commands import clashes
from saekit.plugins import HEAVY, Plugin, Registry
from saekit.registered import OWN_DISTRIBUTION
from saekit.terminal.output import echo, echo_json

SLOW = 0.5  # seconds that the import of a plugin's hooks may take before it is called slow
PATIENCE = 120  # seconds after which an import is abandoned
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE = "THP_MEM_ALLOC_ENABLE"
# What every plugin needs is imported first, so that each is charged only with its own imports.
_TIMED = """
import sys, time
import saekit.component, saekit.hookspecs
module, heavy = sys.argv[1], sys.argv[2:]
out, sys.stdout = sys.stdout, sys.stderr
began = time.perf_counter()
__import__(module)
seconds = time.perf_counter() - began
print(seconds, *(name for name in heavy if name in sys.modules), file=out)
"""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(as_json: bool) -> None:
    """Examine this installation: versions and whether they fit, plugins, slow imports, devices, threads.

    Exit codes: 0 all is well, 2 an installed package does not meet the requirement of another, 3 a plugin is broken.
    """
    with contextlib.redirect_stdout(sys.stderr):  # whatever a plugin prints, stdout has the answer alone
        found = examination()
    if as_json:
        echo_json(found)
    else:
        _print(found)
    if any(plugin["error"] for plugin in found["plugins"]):
        sys.exit(int(ExitCode.PLUGIN_FAILED))
    if found["conflicts"]:
        sys.exit(int(ExitCode.USAGE))


def examination() -> dict[str, Any]:
    """Everything that was examined, as plain values; `problems` are sentences about what to act on."""
    registry = Registry()
    plugins = [_plugin(plugin) for plugin in registry.plugins]
    conflicts = list(version_conflicts({OWN_DISTRIBUTION, *(plugin.distribution for plugin in registry.plugins)}))
    problems = [f"{p.origin} does not load: {p.error} {p.fix}" for p in registry.plugins if p.error]
    for plugin in plugins:
        if plugin["imports"]:
            problems.append(
                f"plugin {plugin['name']!r} ({plugin['distribution']} {plugin['version']}) imports "
                f"{', '.join(plugin['imports'])} whenever names are listed. Move what needs it into the module of the target."
            )
        elif (plugin["import_seconds"] or 0.0) > SLOW:
            problems.append(
                f"plugin {plugin['name']!r} ({plugin['distribution']} {plugin['version']}) takes "
                f"{plugin['import_seconds']:.1f} s to import whenever names are listed. Its hooks' module should import saekit "
                "and nothing else."
            )
        problems += [
            f"plugin {plugin['name']!r} ({plugin['distribution']} {plugin['version']}): {w}" for w in plugin["warnings"]
        ]
    return {
        "saekit": importlib.metadata.version(OWN_DISTRIBUTION),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_machine(),
        "large_pages": _large_pages(),
        "plugins": plugins,
        "conflicts": conflicts,
        "problems": [*problems, *conflicts, *clashes(registry, COMMANDS).values(), *registry.warnings],
    }


def version_conflicts(distributions: set[str]) -> Iterator[str]:
    """A sentence for each missing package, and each with the wrong version, among all direct and indirect
    requirements of these distributions."""
    from packaging.requirements import InvalidRequirement, Requirement

    seen: set[tuple[str, frozenset[str]]] = set()
    left = [(name, frozenset[str]()) for name in sorted(distributions)]
    while left:
        name, extras = left.pop(0)
        if (name.lower(), extras) in seen:
            continue
        seen.add((name.lower(), extras))
        for line in _requires(name):
            try:
                wanted = Requirement(line)
            except InvalidRequirement:
                yield f"{name} asks for {line!r}, which is not a requirement. Upgrade {name}."
                continue
            if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                continue
            try:
                version = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                yield f"{name} asks for {wanted}, which is not installed: pip install '{wanted}'"
                continue
            if not wanted.specifier.contains(version, prereleases=True):
                yield f"{name} asks for {wanted}, but {wanted.name} {version} is installed: pip install '{wanted}'"
            left.append((wanted.name, frozenset(wanted.extras)))


def _requires(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _plugin(plugin: Plugin) -> dict[str, Any]:
    """One plugin, with the time that its hooks' module takes to import in a fresh process."""
    points = importlib.metadata.entry_points(group="saekit", name=plugin.name)
    module = next((p.module for p in points if p.dist and p.dist.name == plugin.distribution), None)
    seconds, heavy = (None, []) if plugin.disabled or plugin.error or module is None else _import_time(module)
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "contract": plugin.contract,
        "disabled": plugin.disabled,
        "error": plugin.error,
        "fix": plugin.fix if plugin.error else None,
        "warnings": plugin.warnings,
        "components": len(plugin.components),
        "commands": [command.name for command in plugin.commands],
        "import_seconds": seconds,
        "imports": heavy,
    }


def _import_time(module: str) -> tuple[float | None, list[str]]:
    """Seconds to import a module in a fresh process, and which of `HEAVY` it imports."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TIMED, module, *HEAVY], capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        seconds, *heavy = done.stdout.split()
    except (subprocess.SubprocessError, OSError, ValueError):
        return None, []
    return round(float(seconds), 3), heavy


def _machine() -> dict[str, Any]:
    import torch

    devices = ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "torch": torch.__version__,
        "devices": devices,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
    }


def _large_pages() -> dict[str, Any]:
    """Whether torch asks for large pages, and whether the system gives them; see docs/performance.md."""
    try:
        words = LARGE_PAGES.read_text(encoding="utf-8").split()
    except OSError:
        words = []
    system = next((word.strip("[]") for word in words if word.startswith("[")), None)
    asked = os.environ.get(VARIABLE) == "1"
    return {"asked": asked, "system": system, "used": asked and system in ("madvise", "always")}


def _print(found: dict[str, Any]) -> None:
    pages = found["large_pages"]
    pages_text = (
        "used"
        if pages["used"]
        else f"not used ({VARIABLE} {'is' if pages['asked'] else 'is not'} 1, system: {pages['system']})"
    )
    facts = {
        "saekit": found["saekit"],
        "Python": f"{found['python']} on {found['platform']}",
        "torch": found["torch"],
        "devices": ", ".join(found["devices"]),
        "threads": f"{found['threads']} of {found['processors']} processors",
        "large pages": pages_text,
    }
    for name, value in facts.items():
        echo(f"{name:<12} {value}")
    echo()
    for plugin in found["plugins"]:
        seconds = plugin["import_seconds"]
        offers = ", ".join([f"{plugin['components']} components", *(f"command {name}" for name in plugin["commands"])])
        state = "broken" if plugin["error"] else "disabled" if plugin["disabled"] else offers
        time = "" if seconds is None else f", imported in {seconds * 1000:.0f} ms"
        echo(f"plugin {plugin['name']:<16} {plugin['distribution']} {plugin['version']}: {state}{time}")
    echo()
    for problem in found["problems"]:
        echo(f"! {problem}", fg="yellow")
    if not found["problems"]:
        echo("All is well.")
