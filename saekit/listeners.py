"""The listeners of a run: callbacks, trackers and the view, called by the lifecycle hooks in the run file's order.

pluggy reads the marks and the deprecations of a listener, but it does not call: it would begin with the last one registered and
stop at the first that raises. A run calls in the order of its file, drops a tracker that fails, and goes on with the next.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pluggy

from saekit.errors import PluginError, SaekitError, UsageError, near_names, under_key
from saekit.hookspecs import PROJECT, Lifecycle, check_arguments
from saekit.process_state import kept

_IN_A_STEP = ("step_started", "gradients_ready", "step_ended")


@dataclass
class Listener:
    """One listener of a run.

    label: its name in the run.
    instance: the object with the hooks.
    origin: where it comes from, for messages.
    vital: whether the run stops when it raises.
    """

    label: str
    instance: Any
    origin: str
    vital: bool


class Listeners:
    """Calls lifecycle hooks on listeners. A vital one (a callback) stops the run when it raises; any other (a tracker, the view)
    is dropped with a warning.

    Each SAE of a run has its own listeners; `above` are those of the whole run (the view), which hear of every SAE.
    who: what is put before a warning that is passed on above. outdated: a sentence for each use of something deprecated.
    """

    def __init__(self, above: Listeners | None = None, who: str = "") -> None:
        self._above, self._who = above, who
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(Lifecycle)
        self._listeners: dict[str, Listener] = {}
        self._calls: dict[str, list[tuple[Listener, Callable[..., object], tuple[str, ...]]]] = {}
        self.warnings: list[str] = []
        self.outdated: list[str] = []

    def add(self, listener: Listener) -> None:
        """Add a listener after the others. PluginError if it misspells a hook."""
        known = [name for name in dir(Lifecycle) if not name.startswith("_")]
        for name in dir(type(listener.instance)):
            marked = getattr(getattr(listener.instance, name, None), f"{PROJECT}_impl", None)
            if marked and name not in known:
                raise PluginError(f"{listener.origin}: {name!r} is not a lifecycle hook.{near_names(name, known)}")
            if marked:
                try:
                    check_arguments(name, getattr(listener.instance, name), Lifecycle)
                except PluginError as error:
                    raise PluginError(f"{listener.origin}: {error}") from None
            if marked and (marked["wrapper"] or marked["hookwrapper"]):
                raise PluginError(f"{listener.origin}: {name!r} is a hook wrapper, which saekit does not call.")
        try:
            with warnings.catch_warnings(record=True) as told:  # pluggy's warnings about deprecated hooks
                warnings.simplefilter("always")
                self._manager.register(listener.instance, name=listener.label)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{listener.origin}: {' '.join(str(error).split())}") from None
        self.outdated += [f"{listener.origin}: {warning.message}" for warning in told]
        self._listeners[listener.label] = listener
        self._calls.clear()

    def __iter__(self) -> Iterator[Listener]:
        return iter(self._listeners.values())

    def emit(self, hook: str, **values: Any) -> None:
        """Call `hook` on every listener that has it, in order, and then on those above."""
        self.call(hook, **values)
        if self._above is not None:
            self._above.emit(hook, **values)

    def call(self, hook: str, **values: Any) -> None:
        """Call `hook` on these listeners, and not on those above."""
        for listener, function, names in self._of(hook):
            if listener.label not in self._listeners:  # dropped since the list was made
                continue
            try:
                with under_key(listener.label), kept(listener.origin, self.warn, in_a_step=hook in _IN_A_STEP):
                    function(*[values[name] for name in names])
            except (Exception, SystemExit) as error:
                # A message meant for the user is passed on as it is. So a tracker may refuse its options, but it cannot stop
                # a run because the disk is full or a server does not answer.
                if isinstance(error, SaekitError if listener.vital else UsageError) and hook != "run_failed":
                    raise
                what = f"{listener.origin} failed in {hook}: {type(error).__name__}: {error}"
                if listener.vital and hook != "run_failed":
                    raise PluginError(f"{what}. What was saved is kept; fix it or leave {listener.label!r} out.") from error
                self._drop(listener)
                self.warn(f"{what}. It is dropped{'.' if hook == 'run_failed' else ' and the run goes on.'}")

    def warn(self, *messages: str) -> None:
        """Tell every listener, and remember it for the summary; the same message only once."""
        for message in messages:
            if message not in self.warnings:
                self.warnings.append(message)
                self.call("warned", message=message)
                if self._above is not None:
                    self._above.warn(f"{self._who}{message}")

    def _of(self, hook: str) -> list[tuple[Listener, Callable[..., object], tuple[str, ...]]]:
        if hook not in self._calls:
            # In the order of registration; pluggy itself would call them in reverse.
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
