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
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from saekit.errors import PluginError, UsageError, near_names

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
        return _options_model(self)

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
        from saekit.choice import Kind

        kind = next((m.name for m in self.options_model().model_fields[name].metadata if isinstance(m, Kind)), None)
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


def validation_lines(error: Any, where: str = "", given: Any = None) -> list[str]:
    """A pydantic error as lines `key: what is wrong (got VALUE)`; `given` is what was validated."""
    lines = []
    for problem in error.errors():
        key = ".".join([where] * bool(where) + _keys(problem["loc"], given, problem["type"] == "missing"))
        if problem["type"] == "missing":
            lines.append(f"{key}: is required and has no default.")
        else:
            lines.append(f"{key}: {problem['msg']} (got {_shown(problem['input'])}).")
    return lines


def _keys(loc: tuple[int | str, ...], given: Any, missing: bool) -> list[str]:
    """pydantic's path to a value as the keys that a user wrote: entries of a list by their names, where they have one,
    and without the names of a union's members, which pydantic puts in between."""
    keys = []
    for position, part in enumerate(loc):
        if isinstance(given, Mapping) and part in given:
            given = given[str(part)]
            keys.append(str(part))
        elif isinstance(given, list | tuple) and isinstance(part, int) and part < len(given):
            given = given[part]
            name = given.get("name") or given.get("use") if isinstance(given, Mapping) else None
            keys.append(str(name or part))
        elif missing and position == len(loc) - 1:
            keys.append(str(part))
    return keys


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def no_true_for_a_number(model: type[BaseModel], given: Mapping[str, Any], where: str) -> None:
    """UsageError for `true` or `false` where a number is wanted: pydantic would take them for 1 and 0."""
    for name, field_info in model.model_fields.items():
        key = field_info.alias or name
        if isinstance(given.get(key), bool) and _wants_number(field_info.annotation):
            raise UsageError(f"{where + '.' if where else ''}{key}: is {str(given[key]).lower()}, but a number is wanted.")


def _wants_number(annotation: Any) -> bool:
    inside = typing.get_args(annotation)
    if any(a is bool or bool in typing.get_args(a) for a in (annotation, *inside)):
        return False
    return annotation in (int, float) or any(_wants_number(a) for a in inside)


@functools.cache
def _options_model(component: Component) -> type[BaseModel]:
    from pydantic import ConfigDict, create_model

    target = component.load()
    function = target.__init__ if inspect.isclass(target) else target
    fields: dict[str, Any] = {}
    for parameter in option_parameters(function, component.origin):
        if parameter.annotation is inspect.Parameter.empty:
            raise PluginError(
                f"{component.origin}: option {parameter.name!r} has no type. "
                f"Annotate it, for example `{parameter.name}: float`, so that it can be validated."
            )
        annotation = _resolve(parameter.annotation, function, component, parameter.name)
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (annotation, default)
    settings = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(f"{component.name}_options", __config__=settings, **fields)


def option_parameters(function: Callable[..., Any], origin: str) -> list[inspect.Parameter]:
    """The keyword-only parameters of `function`; `**kwargs` is refused because it would swallow misspelt options."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        if function is object.__init__:
            return []
        raise PluginError(f"{origin}: its target takes **kwargs, which hides misspelt options. Name each option.")
    return [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def _resolve(annotation: Any, function: Callable[..., Any], component: Component, name: str) -> Any:
    """An annotation written as a string (`from __future__ import annotations`) as the type it names."""
    if not isinstance(annotation, str):
        return annotation
    module = sys.modules.get(function.__module__)
    namespace = dict(vars(module)) if module else {}
    namespace = {**vars(typing), **namespace, **getattr(inspect.unwrap(function), "__globals__", {})}
    try:
        return eval(annotation, namespace)  # a plugin's own annotation: code that is already running
    except Exception as error:
        raise PluginError(f"{component.origin}: the type of option {name!r}, {annotation!r}, cannot be read: {error}") from error
