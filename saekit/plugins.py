"""How plugins are found: entry points and files in, named components out. What a component is: `component.py`.

An error in a plugin is data here, not a crash: `saekit plugins` shows it, and it is raised only for a run that names
what the plugin would have provided.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from saekit import compatibility, plugin_commands
from saekit.component import Component
from saekit.errors import OptionError, PluginError, UsageError, near_names
from saekit.hookspecs import PROJECT, Declaring, check_arguments
from saekit.kinds import HOOKS, KINDS, article
from saekit.process_state import kept
from saekit.registered import OWN_DISTRIBUTION, RegisteredComponent

DISABLE_VARIABLE = "SAEKIT_DISABLE_PLUGINS"
HEAVY = (
    "torch", "numpy", "transformers", "transformer_lens", "sae_lens", "torch_geometric", "sklearn", "scipy", "pandas",
)  # fmt: skip
"""Libraries that the module of a plugin's hooks must not import, so that listing and completing names stays fast."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass
class Plugin:
    """One plugin: its origin, its components, and its error if it has one.

    contract: the version of the contract that it was made for, if it says so.
    warnings: what the user of a run that names it is told.
    heavy: the libraries of `HEAVY` that importing it brought in.
    """

    name: str
    distribution: str
    version: str
    components: list[RegisteredComponent] = field(default_factory=list)
    commands: list[plugin_commands.Command] = field(default_factory=list)
    error: str | None = None
    disabled: bool = False
    file: Path | None = None
    contract: int | None = None
    warnings: list[str] = field(default_factory=list)
    heavy: list[str] = field(default_factory=list)

    @property
    def origin(self) -> str:
        """`plugin 'acme' (saekit-acme 0.3.1)`."""
        return f"plugin {self.name!r} ({self.distribution} {self.version})"

    @property
    def fix(self) -> str:
        """What to do about its error, as the end of a message."""
        if self.file:
            return "Fix it, or leave it out."
        newer = self.contract is not None and self.contract > compatibility.CONTRACT
        first = f"Upgrade saekit, install an earlier {self.distribution}" if newer else f"Fix it, upgrade {self.distribution}"
        return f"{first}, or run with --no-plugin {self.name}."


class Registry:
    """Every installed component, by kind and name.

    files: plugins given as Python files.
    disabled: names of plugins to leave out, in addition to those in the environment variable SAEKIT_DISABLE_PLUGINS
        (separated by commas).
    """

    def __init__(self, *, files: Iterable[str | Path] = (), disabled: Iterable[str] = ()) -> None:
        self.plugins: list[Plugin] = []
        self.warnings: list[str] = []
        blocked = {*disabled, *(name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(","))} - {""}
        found = importlib.metadata.entry_points(group=PROJECT)
        for entry_point in sorted(found, key=lambda e: (e.name, e.dist.name if e.dist else "")):
            distribution = entry_point.dist
            self._add(
                Plugin(entry_point.name, distribution.name if distribution else "?", distribution.version if distribution else "?"),
                entry_point.load,
                blocked,
            )
        for given in files:
            path = Path(given).resolve()
            if not path.is_file():
                raise UsageError(f"plugin {given}: there is no such file. Check --plugin, or plugins in the run file.")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
            plugin = Plugin(path.stem, str(path), digest, file=path)
            self._add(plugin, functools.partial(_module_from_file, path), blocked)
        unknown = blocked - {plugin.name for plugin in self.plugins}
        for name in sorted(unknown):
            self.warnings.append(f"There is no plugin {name!r} to disable.{near_names(name, (p.name for p in self.plugins))}")

    def _add(self, plugin: Plugin, load: Callable[[], Any], blocked: set[str]) -> None:
        self.plugins.append(plugin)
        if plugin.name in blocked:
            plugin.disabled = True
            return
        there = {name for name in HEAVY if name in sys.modules}
        try:
            # What a plugin prints while it loads must not end up in the output of `--json`.
            with contextlib.redirect_stdout(sys.stderr), kept(plugin.origin, self.warn):
                module = load()
                _check_contract(module, plugin)
                plugin.components = _declared(module, plugin, self)
        except PluginError as error:
            plugin.error = str(error)
        except (Exception, SystemExit) as error:
            plugin.error = f"{type(error).__name__}: {error}"
        plugin.heavy = [name for name in HEAVY if name in sys.modules and name not in there]

    def components(self, kind: str | None = None) -> list[RegisteredComponent]:
        """All components of a kind, or of every kind, from the plugins that loaded; sorted by name."""
        found = [c for p in self.plugins for c in p.components if kind in (None, c.kind)]
        return sorted(found, key=lambda c: (KINDS.index(c.kind), c.name, c.plugin))

    def defaults(self, kind: str) -> list[RegisteredComponent]:
        """The components of a kind that join every run, in the order in which their plugins declare them."""
        return [c for p in self.plugins for c in p.components if c.kind == kind and c.default]

    def refuse_broken_files(self) -> None:
        """Raise PluginError for a file that was given as a plugin and does not load: the user named it, unlike an installed
        plugin."""
        for plugin in self.plugins:
            if plugin.file and plugin.error:
                raise PluginError(f"plugin {plugin.file}: does not load: {_sentence(plugin.error)} {plugin.fix}")

    def find(self, kind: str, name: str, where: str = "", requires: Iterable[str] = ()) -> RegisteredComponent:
        """The component that a run means by `name`, short or qualified (`plugin.name`).

        where: the key that asked, for messages.
        requires: distributions that the run file says it needs.
        """
        prefix = f"{where}: " if where else ""
        candidates = [c for c in self.components(kind) if name in (c.name, c.qualified_name)]
        if not candidates:
            raise self._unknown(kind, name, prefix, requires)
        files = [c for c in candidates if any(p.file and p.name == c.plugin for p in self.plugins)]
        others = files or [c for c in candidates if c.distribution != OWN_DISTRIBUTION]
        if len({c.distribution for c in others}) > 1:
            claims = " and ".join(f"{c.qualified_name} ({c.distribution} {c.version})" for c in others)
            fix = "Name the one you mean in full."
            if len({c.qualified_name for c in others}) < len(others):
                fix = "Their plugins have the same name, so uninstall one of them."
            raise UsageError(f"{prefix}two plugins offer {article(kind)} {name!r}: {claims}. {fix}")
        chosen = (others or candidates)[0]
        if len(candidates) > 1:
            hidden = ", ".join(c.qualified_name for c in candidates if c is not chosen)
            warning = f"{kind} {name!r} is {chosen.qualified_name} ({chosen.distribution}), which overrides {hidden}."
            self.warn(warning)
        for plugin in self.plugins:
            if chosen in plugin.components:
                for message in plugin.warnings:
                    self.warn(f"{plugin.origin}: {message}")
        return chosen

    def warn(self, message: str) -> None:
        """What a run is told of its plugins; the same message only once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def _unknown(self, kind: str, name: str, prefix: str, requires: Iterable[str]) -> Exception:
        word = kind.replace("_", " ")
        plugin_name = name.partition(".")[0] if "." in name else None
        for plugin in self.plugins:
            if plugin_name == plugin.name and plugin.disabled:
                return UsageError(f"{prefix}{word} {name!r} belongs to plugin {plugin.name!r}, which is disabled.")
        broken = [p for p in self.plugins if p.error]
        if plugin_name is not None:
            broken = [p for p in broken if p.name == plugin_name]
        known = [c.name for c in self.components(kind)]
        absent = [r for r in requires if not _installed(r)]
        if broken and not absent:
            causes = " ".join(f"{p.origin} failed to load: {_sentence(p.error or '')} {p.fix}" for p in broken)
            return PluginError(f"{prefix}there is no {word} {name!r}, but {causes}{near_names(name, known)}")
        disabled = [p.name for p in self.plugins if p.disabled]
        if absent:
            fix = f" This run file requires what is not installed: pip install {' '.join(absent)}"
        elif disabled:
            fix = f" Disabled plugins, which may have it: {', '.join(disabled)}."
        else:
            fix = " If it comes with a plugin, install that one with pip (they are named saekit-*)."
        return UsageError(
            f"{prefix}there is no {word} {name!r}.{near_names(name, known)} Installed: {', '.join(known) or 'none'}.{fix}"
        )


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _installed(requirement: str) -> bool:
    name = re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0]
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _module_name(path: Path) -> str:
    return f"saekit_file_{path.stem}"


def _module_from_file(path: Path) -> ModuleType:
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def named_function(name: str, option: str, takes: str) -> Callable[..., Any]:
    """The function that `name` names: "module:function", imported from the Python path, or "FILE.py:function".

    A run file's `FILE.py` is relative to the run file, and was made absolute when it was read.
    option: the option that names it; takes: its arguments, for messages. OptionError if there is no such function."""
    module, _, function = name.rpartition(":")
    if not module or not function:
        raise OptionError(option, f"{name!r}: write FILE.py:function or module:function, for example my_judge.py:score.")
    if module.endswith(".py") and not Path(module).is_file():
        raise OptionError(option, f"{module}: there is no such file. In a run file its path is relative to that file.")
    try:
        found: Any = getattr(_loaded(Path(module)), function) if module.endswith(".py") else pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:
        fix = "Mend the file." if module.endswith(".py") else "Put its module on PYTHONPATH, or write FILE.py:function."
        raise OptionError(option, f"{name!r} cannot be imported: {type(error).__name__}: {error}. {fix}") from None
    if not callable(found):
        raise OptionError(option, f"{name!r} is not a function of {takes}.")
    return found


def _loaded(file: Path) -> ModuleType:
    """The module in a file, executed once however many options name it."""
    file = file.resolve()
    known = sys.modules.get(_module_name(file))
    if known is not None and known.__file__ == str(file):
        return known
    try:
        return _module_from_file(file)
    except BaseException:
        sys.modules.pop(_module_name(file), None)
        raise


def _check_contract(module: Any, plugin: Plugin) -> None:
    """Note which version of the contract a plugin was made for; PluginError for one that cannot be used."""
    made_for = getattr(module, compatibility.DECLARATION, None)
    if made_for is None:
        return
    if not isinstance(made_for, int) or isinstance(made_for, bool):
        raise PluginError(
            f"{compatibility.DECLARATION} is {made_for!r}, but a whole number is wanted, such as {compatibility.CONTRACT}."
        )
    plugin.contract = made_for
    error = compatibility.refused(made_for)
    if error is not None:
        raise PluginError(error)
    if made_for < compatibility.CONTRACT:
        plugin.warnings.append(
            f"was made for contract {made_for} of saekit, which is now {compatibility.CONTRACT}. "
            f"{compatibility.changes_since(made_for)} Upgrade {plugin.distribution} if it misbehaves."
        )


def _declared(module: Any, plugin: Plugin, registry: Registry) -> list[RegisteredComponent]:
    """The components that a plugin's module declares. PluginError for anything that would silently do nothing."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Declaring)
    known = {**{hook: kind for kind, hook in HOOKS.items()}, plugin_commands.HOOK: "command"}
    for name, value in vars(module).items():
        if name.startswith("saekit_") and inspect.isroutine(value) and name not in known:
            raise PluginError(f"{name!r} is not a hook of saekit.{near_names(name, known)}")
        if name in known and inspect.isroutine(value) and not hasattr(value, f"{PROJECT}_impl"):
            raise PluginError(f"{name!r} lacks the decorator @saekit.hookimpl, so it would never be called.")
        if name not in known and inspect.isroutine(value) and hasattr(value, f"{PROJECT}_impl"):
            raise PluginError(
                f"{name!r} is not a hook of a plugin's module.{near_names(name, known)} Lifecycle hooks are methods of a "
                "callback's or a tracker's class."
            )
        if name in known and inspect.isroutine(value):
            check_arguments(name, value, Declaring)
    try:
        with warnings.catch_warnings(record=True) as told:  # pluggy's, of what a specification calls deprecated
            warnings.simplefilter("always")
            manager.register(module, name=plugin.name)
    except pluggy.PluginValidationError as error:
        raise PluginError(" ".join(str(error).split())) from None
    plugin.warnings += [f"{warning.message} Upgrade {plugin.distribution}; until then it works." for warning in told]
    found = []
    for hook_name, kind in known.items():
        for implementation in getattr(manager.hook, hook_name).get_hookimpls():
            declared = implementation.function()
            if not isinstance(declared, Iterable):
                what = "commands" if kind == "command" else "components"
                raise PluginError(f"{hook_name} must return or yield {what}, not {type(declared).__name__}.")
            if hook_name == plugin_commands.HOOK:
                if plugin.file is not None:
                    raise PluginError(f"a file cannot add a command, only an installed plugin can. Take {hook_name} out.")
                plugin.commands = list(plugin_commands.checked(declared))
            else:
                found += [_registered(c, hook_name, kind, plugin, registry) for c in declared]
    for kind in KINDS:
        names = [c.name for c in found if c.kind == kind]
        for name in set(names):
            if names.count(name) > 1:
                raise PluginError(f"it declares two components of the kind {kind} that are called {name!r}.")
    return found


_BARE = Component("", "")


def _registered(component: Any, hook_name: str, kind: str, plugin: Plugin, registry: Registry) -> RegisteredComponent:
    if not isinstance(component, Component):
        raise PluginError(f"{hook_name} must yield saekit.Component, not {type(component).__name__}.")
    if not isinstance(component.name, str) or not _NAME.fullmatch(component.name):
        raise PluginError(f"{hook_name}: {component.name!r} is not a name for a component; use lower case and underscores.")
    if not isinstance(component.target, str) and plugin.file is None:
        raise PluginError(
            f"{hook_name}: the target of {component.name!r} must be a string 'package.module:Object', so that listing "
            "names imports nothing; only a file given with --plugin may hand over the object itself."
        )
    for field_name in ("needs", "provides"):
        words = getattr(component, field_name)
        if not isinstance(words, tuple) or not all(isinstance(word, str) for word in words):
            raise PluginError(f'{hook_name}: {field_name} of {component.name!r} must be a tuple of words, such as ("labels",).')
    for field_name, instead in compatibility.DEPRECATED_FIELDS.items():
        if getattr(component, field_name) != getattr(_BARE, field_name):
            told = f"{component.name!r} sets the field {field_name}, which is deprecated. {instead}"
            plugin.warnings.append(f"{told} Upgrade {plugin.distribution}; until then it works.")
    summary = component.summary
    if not summary and not isinstance(component.target, str):
        summary = (inspect.getdoc(component.target) or "").partition("\n")[0]
    return RegisteredComponent(
        **{**vars(component), "summary": summary},
        kind=kind,
        plugin=plugin.name,
        distribution=plugin.distribution,
        version=plugin.version,
        registry=registry,
    )
