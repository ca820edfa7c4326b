"""The checks of every component, of any kind: how it is declared, and its options."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import json
import subprocess
import sys
from typing import Any

from saekit.errors import PluginError, near_names
from saekit.hookspecs import PROJECT
from saekit.plugins import HEAVY
from saekit.runner.plan import ALWAYS_PROVIDED, GRAPH
from saekit.testing.kit import Check, Failed, NotApplicable, Subject

_DECLARE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from saekit.plugins import Registry
plugin = next(plugin for plugin in Registry(disabled=sys.argv[3:]).plugins if plugin.name == sys.argv[2])
if plugin.error:
    sys.exit(plugin.error)
print(json.dumps(sorted(sys.modules)))
"""


def has_summary(subject: Subject) -> None:
    """One line that says what it is."""
    summary = subject.component.summary
    if not summary.strip():
        raise Failed("it has no summary. Give Component a third argument: one line for `saekit plugins`.")
    if "\n" in summary:
        raise Failed("its summary has several lines. Keep it to one, and say the rest in the target's docstring.")


def words_are_known(subject: Subject) -> None:
    """What it needs is provided by something; what it provides is not a misspelt word of another component."""
    component = subject.component
    others = [other for other in subject.registry.components() if other != component]
    provided = {*ALWAYS_PROVIDED, GRAPH}.union(*(other.provides for other in others))
    for need in component.needs:
        if need not in provided:
            raise Failed(
                f"it needs {need!r}, which nothing installed provides.{near_names(need, provided)} Correct the word, "
                "or install the plugin that provides it."
            )
    known = provided.union(*(other.needs for other in others))
    for word in component.provides:
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.8)
        if near and word not in known:
            raise Failed(f"it provides {word!r}, which nothing needs. Did you mean {near[0]!r}?")


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
        raise NotApplicable("its target is an object, given by a file or a test, so nothing is imported by name.")
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
    others = {entry_point.name for entry_point in importlib.metadata.entry_points(group=PROJECT)} - {plugin}
    done = subprocess.run(
        [sys.executable, "-c", _DECLARE, json.dumps(sys.path), plugin, *sorted(others)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failed(f"a fresh interpreter cannot declare it: {done.stderr.strip().splitlines()[-1]}. Fix the plugin's module.")
    return frozenset(json.loads(done.stdout.splitlines()[-1]))


CHECKS: tuple[Check, ...] = (
    Check("has_summary", "It has a summary of one line.", has_summary),
    Check(
        "words_are_known",
        "Something provides what it needs, and what it provides is not a misspelt word of another component.",
        words_are_known,
    ),
    Check("options_documented", "Every option has a type and a description.", options_documented),
    Check("defaults_are_valid", "The default of every option is within its own limits.", defaults_are_valid),
    Check(
        "light_to_declare",
        "Declaring it imports nothing heavy (torch, say), and not the module of its target.",
        light_to_declare,
    ),
)
