"""Functions of the user's: found by name, in a package or a file, and called so that a mistake in them is named with its line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.errors import OptionError, SaekitError, near_names

if TYPE_CHECKING:
    MadeBy = str | Callable[..., Any]  # in Python also the function itself
else:
    MadeBy = str

_PACKAGE = str(Path(__file__).parents[2])  # saekit's own files, which a message about the user's need not name


def name_of(made_by: Any) -> str:
    """What the user called it. A function may say so itself, as `said_as`."""
    said = getattr(made_by, "said_as", None)
    if isinstance(said, str):
        return said
    if isinstance(made_by, str):
        return made_by
    return f"{getattr(made_by, '__module__', '?')}:{getattr(made_by, '__qualname__', type(made_by).__name__)}"


def named_object(what: Any, option: str) -> Any:
    """The object that `package.module:name` or `file.py:name` names; anything but a text is that object itself."""
    if not isinstance(what, str):
        return what
    where, _, name = what.rpartition(":")
    if not where or not name:
        raise OptionError(option, f"{what!r} names nothing. Write package.module:function, or file.py:function.")
    module = _from_file(Path(where).expanduser(), option) if where.endswith(".py") else _imported(where, option)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise OptionError(option, f"{where} has no {part!r}.{near_names(part, vars(found))}")
        found = getattr(found, part)
    return found


def called(function: Any, option: str, made_by: Any, *args: Any, **given: Any) -> Any:
    """What a function of the user's returns. OptionError, with its line, if it fails."""
    try:
        return function(*args, **given)
    except SaekitError:
        raise
    except Exception as error:
        raise OptionError(option, f"{name_of(made_by)} failed: {failure(error)}.") from error


def failure(error: Exception) -> str:
    """An error in the user's code, with its innermost line."""
    everything = traceback.extract_tb(error.__traceback__)
    frames = [f for f in everything if "site-packages" not in f.filename and _PACKAGE not in f.filename] or everything
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def parameters_of(function: Any, known: set[str]) -> set[str]:
    """Which of the `known` parameters a function takes."""
    try:
        return known & set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not a function, or one without a signature
        return set()


def _imported(name: str, option: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        fix = "Install it, or give the path of the file: ./my_model.py:function."
        raise OptionError(option, f"{name!r} cannot be imported: {error}. {fix}") from None
    except Exception as error:
        raise OptionError(option, f"{name!r} cannot be imported: {failure(error)}.") from error


def _from_file(path: Path, option: str) -> Any:
    """A file as a module, loaded once."""
    path = path.resolve()
    if not path.is_file():
        raise OptionError(option, f"{path}: there is no such file. Paths are relative to where the command is run.")
    name = f"saekit_module_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # it ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise OptionError(option, f"{path} cannot be loaded: {failure(error)}.") from error
    return sys.modules[name]
