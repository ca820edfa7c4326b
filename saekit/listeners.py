"""The listeners of a run: callbacks, trackers and the view, called by the lifecycle hooks in the run file's order."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pluggy

from saekit.errors import PluginError, SaekitError, UsageError, near_names, under_key
from saekit.hookspecs import PROJECT, Lifecycle, check_arguments


@dataclass
class Listener:
    """One listener: what it is called in the run, the object, and whether a failure of it stops the run."""

    label: str
    instance: Any
    origin: str
    vital: bool


class Listeners:
    """Calls lifecycle hooks on listeners. One that is vital (a callback) stops the run when it raises; another
    (a tracker, the view) is dropped with a warning.

    Each SAE of a run has its own, `above` which stands the run's, with what looks at all of them (the view).
    who: what is put before a warning that goes on above. outdated: a sentence for each use of what is deprecated.
    """

    def __init__(self, above: Listeners | None = None, who: str = "") -> None:
        self._above, self._who = above, who
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(Lifecycle)
        self._listeners: dict[str, Listener] = {}
        self._calls: dict[str, list[tuple[Listener, Any, tuple[str, ...]]]] = {}
        self.warnings: list[str] = []
        self.outdated: list[str] = []

    def add(self, listener: Listener) -> None:
        """Register a listener behind those that are there; a hook it misspells is a PluginError."""
        known = [name for name in dir(Lifecycle) if not name.startswith("_")]
        for name in dir(type(listener.instance)):
            marked = getattr(getattr(listener.instance, name, None), f"{PROJECT}_impl", None)
            if marked and name not in known:
                raise PluginError(f"{listener.origin}: {name!r} is no lifecycle hook.{near_names(name, known)}")
            if marked:
                try:
                    check_arguments(name, getattr(listener.instance, name), Lifecycle)
                except PluginError as error:
                    raise PluginError(f"{listener.origin}: {error}") from None
            if marked and (marked["wrapper"] or marked["hookwrapper"]):
                raise PluginError(f"{listener.origin}: {name!r} is a hook wrapper, which saekit does not call.")
        try:
            with warnings.catch_warnings(record=True) as told:  # pluggy's, of what a specification calls deprecated
                warnings.simplefilter("always")
                self._manager.register(listener.instance, name=listener.label)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{listener.origin}: {' '.join(str(error).split())}") from None
        self.outdated += [f"{listener.origin}: {warning.message}" for warning in told]
        self._listeners[listener.label] = listener
        self._calls.clear()

    def __iter__(self):
        return iter(self._listeners.values())

    def emit(self, hook: str, **values: Any) -> None:
        """Call `hook` on every listener that has it, in order, and then on those above."""
        self.call(hook, **values)
        if self._above is not None:
            self._above.emit(hook, **values)

    def call(self, hook: str, **values: Any) -> None:
        """Call `hook` on the listeners here, and on none above."""
        for listener, function, names in self._of(hook):
            if listener.label not in self._listeners:  # dropped since the list was made
                continue
            try:
                with under_key(listener.label):
                    function(*[values[name] for name in names])
            except Exception as error:
                # What a listener says itself to the user is passed on as it is; a tracker may so refuse what it was given,
                # but not stop a run because the disk is full or a server is away.
                if isinstance(error, SaekitError if listener.vital else UsageError) and hook != "run_failed":
                    raise
                what = f"{listener.origin} failed in {hook}: {type(error).__name__}: {error}"
                if listener.vital and hook != "run_failed":
                    raise PluginError(f"{what}. What was saved is kept; mend it or leave {listener.label!r} out.") from error
                self._drop(listener)
                self.warn(f"{what}. It is dropped{'.' if hook == 'run_failed' else ' and the run goes on.'}")

    def warn(self, message: str) -> None:
        """Tell every listener, and remember it for the summary; the same message only once."""
        if message not in self.warnings:
            self.warnings.append(message)
            self.call("warned", message=message)
            if self._above is not None:
                self._above.warn(f"{self._who}{message}")

    def _of(self, hook: str):
        if hook not in self._calls:
            # pluggy lists implementations last registered last, and would call them in reverse; we call in order.
            implementations = getattr(self._manager.hook, hook).get_hookimpls()
            self._calls[hook] = [(self._listeners[i.plugin_name], i.function, i.argnames) for i in implementations]
        return list(self._calls[hook])

    def _drop(self, listener: Listener) -> None:
        self._manager.unregister(name=listener.label)
        close = getattr(listener.instance, "close", None)
        if close is not None:  # a view must give the terminal back
            close()
        del self._listeners[listener.label]
        self._calls.clear()
