"""What is asked of every component, whatever its kind: how it is declared, and its options."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
import sys
from typing import Any

from saekit.errors import PluginError
from saekit.hookspecs import PROJECT
from saekit.plugins import HEAVY
from saekit.testing.kit import Check, Failed, NotApplicable, Subject

_DECLARE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from saekit.plugins import Plugin, _declared
import importlib
module = importlib.import_module(sys.argv[2])
_declared(module, Plugin(sys.argv[3], "", ""))
print(json.dumps(sorted(sys.modules)))
"""


def has_summary(subject: Subject) -> None:
    """One line that says what it is."""
    summary = subject.component.summary
    if not summary.strip():
        raise Failed("it has no summary. Give Component a third argument: one line for `saekit plugins`.")
    if "\n" in summary:
        raise Failed("its summary has several lines. Keep it to one, and say the rest in the target's docstring.")


def options_documented(subject: Subject) -> None:
    """Every option has a type and a description."""
    try:
        fields = subject.component.options_model().model_fields
    except PluginError as error:
        raise Failed(str(error)) from error
    silent = [name for name, info in fields.items() if not (info.description or "").strip()]
    if silent:
        raise Failed(
            f"option {silent[0]!r} has no description. Write "
            f'`{silent[0]}: Annotated[..., Field(description="...")]`, so that `saekit plugins show` can say what it does.'
        )


def defaults_are_valid(subject: Subject) -> None:
    """A default is what most runs use, and is validated nowhere else."""
    from pydantic import ConfigDict, ValidationError

    try:
        model = subject.component.options_model()
    except PluginError:
        return  # which `options_documented` reports
    strict = type("Defaults", (model,), {"model_config": ConfigDict(validate_default=True)})
    try:
        strict()
    except ValidationError as error:
        for problem in error.errors():
            if problem["type"] != "missing":
                raise Failed(
                    f"the default of option {problem['loc'][0]!r}, {problem['input']!r}, breaks the option's own rule: "
                    f"{problem['msg']}. Change the default, or the rule."
                ) from None


def light_to_declare(subject: Subject) -> None:
    """Declaring and naming it imports nothing heavy, and not its target."""
    component = subject.component
    if not isinstance(component.target, str):
        raise NotApplicable("it was handed over as an object, by a file or a test; nothing is imported by its name.")
    modules = _modules_after_declaring(component.plugin)
    heavy = [name for name in HEAVY if name in modules]
    if heavy:
        raise Failed(
            f"declaring it imports {heavy[0]}, so every `saekit plugins` would. Import it where the target is defined, and "
            "name the target as a string."
        )
    target = component.target.partition(":")[0]
    if target in modules and target != _entry_point(component.plugin).module:
        raise Failed(f"declaring it imports its target's module {target}. Name the target as a string and do not import it.")


def _entry_point(plugin: str) -> Any:
    for entry_point in importlib.metadata.entry_points(group=PROJECT):
        if entry_point.name == plugin:
            return entry_point
    raise NotApplicable("its plugin is not installed; a file or a test handed it over.")


@functools.cache
def _modules_after_declaring(plugin: str) -> frozenset[str]:
    """The modules that a fresh interpreter holds once the plugin has declared its components."""
    done = subprocess.run(
        [sys.executable, "-c", _DECLARE, json.dumps(sys.path), _entry_point(plugin).module, plugin],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failed(f"a fresh interpreter cannot declare it: {done.stderr.strip().splitlines()[-1]}. Mend the plugin's module.")
    return frozenset(json.loads(done.stdout.splitlines()[-1]))


CHECKS: tuple[Check, ...] = (
    Check("has_summary", "It has a summary of one line.", has_summary),
    Check("options_documented", "Every option has a type and a description.", options_documented),
    Check("defaults_are_valid", "The default of every option is within its own limits.", defaults_are_valid),
    Check(
        "light_to_declare",
        "Declaring it imports nothing heavy (torch, say), and not the module of its target.",
        light_to_declare,
    ),
)
