"""What a component is: a named, swappable part of a run, whose target is imported only when a run names it.

A component's *options* are the keyword-only parameters of its target, with their types. Nothing is declared
twice: validation, `saekit plugins show`, completion and the JSON Schema all read the signature.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from saekit.errors import PluginError, UsageError, near_names
from saekit.options import no_true_for_a_number, options_model, validation_lines

if TYPE_CHECKING:
    from pydantic import BaseModel

KINDS = ("architecture", "loss", "graph_builder", "metric", "analyzer", "callback", "source", "tracker", "recipe")
"""Every kind of component."""
HOOKS = {kind: f"saekit_{kind}es" if kind.endswith("s") else f"saekit_{kind}s" for kind in KINDS}
"""The declaring hook of each kind."""
OWN_DISTRIBUTION = "saekit"


@dataclass(frozen=True)
class Component:
    """One named part that a plugin offers.

    name: what a run file says after `use =`.
    target: `"package.module:Object"`, imported when a run names it; in a file loaded with `--plugin`, the callable.
    summary: one line for listings; taken from the target's docstring where it is handed over directly.
    needs: what it cannot work without (`"labels"`, `"subject_model"`, `"sequences"`, ...).
    provides: what it makes available to others; checked against `needs` before anything is loaded.
    default: whether it joins every run that can hold it, unless the run file says `defaults = false`.

    The rest is filled in by the registry and says where the component came from.
    """

    name: str
    target: str | Callable[..., Any]
    summary: str = ""
    needs: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    default: bool = False
    registry: Any = field(default=None, kw_only=True, compare=False, repr=False)
    kind: str = field(default="", kw_only=True)
    plugin: str = field(default="", kw_only=True)
    distribution: str = field(default="", kw_only=True)
    version: str = field(default="", kw_only=True)

    @property
    def qualified_name(self) -> str:
        """`plugin.name`, which is never ambiguous."""
        return f"{self.plugin}.{self.name}"

    @property
    def origin(self) -> str:
        """Who ships it, for messages: `loss 'infonce' of plugin 'contrastive' (saekit-contrastive 0.1.0)`."""
        return f"{self.kind} {self.name!r} of plugin {self.plugin!r} ({self.distribution} {self.version})".rstrip()

    @property
    def title(self) -> str:
        """`loss 'mse'`, and who ships it where that is not saekit itself."""
        return self.origin if self.distribution != OWN_DISTRIBUTION else f"{self.kind} {self.name!r}"

    def load(self) -> Any:
        """Import and return the target. Raises PluginError, with the cause, if that fails."""
        if not isinstance(self.target, str):
            return self.target
        module_name, _, attribute = self.target.partition(":")
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout may be carrying a JSON document
                target: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                target = getattr(target, part)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self.origin} cannot be loaded from {self.target!r}: {type(error).__name__}: {error}. "
                f"Mend or upgrade {self.distribution}, or leave {self.name!r} out of the run."
            ) from error
        return target

    def options_model(self) -> type[BaseModel]:
        """A pydantic model of the options, one field for each keyword-only parameter of the target."""
        return options_model(self.load(), self.name, self.origin)

    def validate(self, options: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`options` checked and converted; `where` is the key they came from, such as `loss.infonce`."""
        from pydantic import ValidationError

        model = self.options_model()
        no_true_for_a_number(model, options, where)
        for key in options:
            if key not in model.model_fields:
                known = ", ".join(model.model_fields) or "none"
                raise UsageError(
                    f"{where}.{key}: {self.kind} {self.name!r} has no option {key!r}."
                    f"{near_names(key, model.model_fields)} Its options: {known} (see: saekit plugins show {self.name})."
                )
        try:
            checked = model(**options)
        except ValidationError as error:
            raise UsageError("\n".join(validation_lines(error, where, options))) from None
        return {name: self._looked_up(name, getattr(checked, name), where) for name in model.model_fields}

    def _looked_up(self, name: str, value: Any, where: str) -> Any:
        """The value of an option; one that names a component with that component found."""
        from saekit.component_option import OfKind

        kind = next((m.name for m in self.options_model().model_fields[name].metadata if isinstance(m, OfKind)), None)
        if kind is None or value is None:
            return value
        if self.registry is None:
            raise PluginError(f"{self.origin}: option {name!r} names a component, which only a registry can find.")
        return value.resolved(self.registry, kind, f"{where}.{name}")

    def build(self, options: Mapping[str, Any], *args: Any) -> Any:
        """The component at work: an instance where the target is a class, else the function with options bound."""
        target = self.load()
        try:
            if inspect.isclass(target):
                return target(*args, **options)
        except UsageError:
            raise
        except Exception as error:
            raise PluginError(f"{self.origin} could not be built: {type(error).__name__}: {error}") from error
        if args:
            raise PluginError(f"{self.origin}: its target must be a class.")
        return functools.partial(target, **options) if options else target
