"""Options of a component: the keyword-only parameters of its target, read from the signature and validated by pydantic."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from saekit.errors import PluginError, UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel


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
def options_model(target: Callable[..., Any], name: str, origin: str) -> type[BaseModel]:
    """A pydantic model of the options of `target`: one field for each keyword-only parameter.

    name, origin: what the component is called, and who ships it, for messages."""
    from pydantic import ConfigDict, create_model

    function = target.__init__ if inspect.isclass(target) else target
    fields: dict[str, Any] = {}
    for parameter in option_parameters(function, origin):
        if parameter.annotation is inspect.Parameter.empty:
            raise PluginError(
                f"{origin}: option {parameter.name!r} has no type. "
                f"Annotate it, for example `{parameter.name}: float`, so that it can be validated."
            )
        annotation = _resolve(parameter.annotation, function, origin, parameter.name)
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (annotation, default)
    settings = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(f"{name}_options", __config__=settings, **fields)


def option_parameters(function: Callable[..., Any], origin: str) -> list[inspect.Parameter]:
    """The keyword-only parameters of `function`; `**kwargs` is refused because it would swallow misspelt options."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        if function is object.__init__:
            return []
        raise PluginError(f"{origin}: its target takes **kwargs, which hides misspelt options. Name each option.")
    return [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def _resolve(annotation: Any, function: Callable[..., Any], origin: str, name: str) -> Any:
    """An annotation written as a string (`from __future__ import annotations`) as the type it names."""
    if not isinstance(annotation, str):
        return annotation
    module = sys.modules.get(function.__module__)
    namespace = dict(vars(module)) if module else {}
    namespace = {**vars(typing), **namespace, **getattr(inspect.unwrap(function), "__globals__", {})}
    try:
        return eval(annotation, namespace)  # a plugin's own annotation: code that is already running
    except Exception as error:
        raise PluginError(f"{origin}: the type of option {name!r}, {annotation!r}, cannot be read: {error}") from error
