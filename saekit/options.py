"""Options of a component: the keyword-only parameters of its target, read from the signature and validated by pydantic."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from saekit.errors import PluginError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationInfo


def validation_lines(error: Any, where: str = "", given: Any = None) -> list[str]:
    """The lines `key: what is wrong (got VALUE)` of a pydantic error; `given` is what was validated."""
    lines = []
    for problem in error.errors():
        key = ".".join([where] * bool(where) + _keys(problem["loc"], given, problem["type"] == "missing"))
        if problem["type"] == "missing":
            lines.append(f"{key}: is required and has no default.")
        else:
            lines.append(f"{key}: {problem['msg']} (got {_shown(problem['input'])}).")
    return lines


def _keys(loc: tuple[int | str, ...], given: Any, missing: bool) -> list[str]:
    """The keys that a user wrote, from pydantic's path to a value: entries of a list by their names if they have one,
    and without the names of a union's members, which pydantic inserts."""
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
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of very many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse_odd_numbers(model: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """A validator of every field: refuses `true` and `false` where a number is wanted, which pydantic would read as 1 and 0,
    and everywhere NaN, which no comparison finds, and whole numbers beyond 64 bits, which neither torch nor numpy takes."""
    from pydantic_core import PydanticCustomError

    if isinstance(value, bool) and _wants_number(model.model_fields[str(info.field_name)].annotation):
        raise PydanticCustomError("number_wanted", f"is {str(value).lower()}, but a number is wanted")
    for number in _numbers_in(value):
        if number != number:
            raise PydanticCustomError("not_a_number", "nan is not a finite number. Give a number, or leave the key out")
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            raise PydanticCustomError("too_large", "a whole number must fit in 64 bits. Give a smaller one")
    return value


def _numbers_in(value: Any) -> Iterator[int | float]:
    """The numbers of a field; those in a table are the fields of another model."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers_in(inner)


def _wants_number(annotation: Any) -> bool:
    inside = typing.get_args(annotation)
    if any(a is bool or bool in typing.get_args(a) for a in (annotation, *inside)):
        return False
    return annotation in (int, float) or any(_wants_number(a) for a in inside)


@functools.cache
def options_model(target: Callable[..., Any], name: str, origin: str) -> type[BaseModel]:
    """A pydantic model of the options of `target`: one field for each keyword-only parameter, the required ones first.

    name, origin: what the component is called, and who ships it, for messages."""
    from pydantic import ConfigDict, create_model, field_validator

    fields: dict[str, Any] = {}
    for parameter in option_parameters(target, origin):
        if parameter.annotation is inspect.Parameter.empty:
            raise PluginError(
                f"{origin}: option {parameter.name!r} has no type. "
                f"Annotate it, for example `{parameter.name}: float`, so that it can be validated."
            )
        fields[parameter.name] = (_resolve(parameter, target, origin), _default(parameter, target))
    settings = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    numbers: Any = field_validator("*", mode="before")(classmethod(refuse_odd_numbers))
    return create_model(f"{name}_options", __config__=settings, __validators__={"numbers": numbers}, **fields)


def option_parameters(target: Callable[..., Any], origin: str) -> list[inspect.Parameter]:
    """The keyword-only parameters of a class or a function, the required ones first.

    PluginError for `**kwargs`, which would swallow misspelt options."""
    function = _function(target)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise PluginError(f"{origin}: its target is {target!r}, whose parameters cannot be read: {error}.") from None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        if function is object.__init__:
            return []
        raise PluginError(f"{origin}: its target takes **kwargs, which hides misspelt options. Name each option.")
    options = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return sorted(options, key=lambda p: not _is_required(p))


def _function(target: Callable[..., Any]) -> Callable[..., Any]:
    return target.__init__ if inspect.isclass(target) else target


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def _default(parameter: inspect.Parameter, target: Callable[..., Any]) -> Any:
    """The default as pydantic takes it. The signature of a dataclass holds only a placeholder for a `default_factory`;
    what that gives is copied for each instance, as pydantic does with every default that can be changed."""
    if _is_required(parameter):
        return ...
    field = getattr(target, "__dataclass_fields__", {}).get(parameter.name)
    if field is not None and parameter.annotation is field.type and field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return parameter.default


def _resolve(parameter: inspect.Parameter, target: Callable[..., Any], origin: str) -> Any:
    """An annotation written as a string (`from __future__ import annotations`) as the type it names."""
    annotation = parameter.annotation
    if not isinstance(annotation, str):
        return annotation
    try:
        # a plugin's own annotation: code that is already running
        return eval(annotation, {**vars(typing), **_names_around(parameter, target)})
    except Exception as error:
        raise PluginError(
            f"{origin}: the type of option {parameter.name!r}, {annotation!r}, cannot be read: {error}"
        ) from error


def _names_around(parameter: inspect.Parameter, target: Callable[..., Any]) -> Mapping[str, Any]:
    """The names known where a parameter's type was written: for a dataclass's field in the module of the class that
    declares it, which may be a base class in another module; otherwise in the function's module."""
    function = _function(target)
    for cls in getattr(target, "__mro__", ()):
        if inspect.get_annotations(cls).get(parameter.name) is parameter.annotation:
            return vars(sys.modules[cls.__module__])
    return getattr(inspect.unwrap(function), "__globals__", {})
