"""A zoo of bad plugins, all installed at once: a run that names none of them works, and one that does is told which plugin
of which distribution it was, why, and what to do.

Each way to fail by itself, and more of them: `test_plugins.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import Fakes, Outcome, python

from saekit.compatibility import CONTRACT, OLDEST
from saekit.plugins import Registry

ONE = """
from saekit import Component, hookimpl

@hookimpl
def saekit_losses():
    yield Component({name!r}, "zoo_targets:{target}", "A loss of {plugin}."{more})
"""
TARGETS = """
print("noise of a target")

def good(step):
    return step.error.square().mean()

def raises(step):
    raise KeyError("the table that it was promised")

def untyped(step, *, eps=1.0):
    return step.error.mean()
"""
LISTENER = """
from saekit import Component, hookimpl

@hookimpl
def saekit_callbacks():
    yield Component("{name}", "zoo_listeners:{target}", "A callback.")
"""
LISTENERS = """
from saekit import hookimpl

class Raises:
    @hookimpl
    def step_ended(self, trainer, number):
        if number == 3:
            raise ZeroDivisionError("in step three")

class Misspells:
    @hookimpl
    def step_end(self, trainer):
        pass

class AsksForMore:
    @hookimpl
    def step_ended(self, trainr):
        pass
"""


@dataclass(frozen=True)
class Animal:
    """A bad plugin. names: what a run has to say to meet it. says: the cause, and the fix. loads: whether its hooks do."""

    source: str
    names: dict[str, Any]
    says: tuple[str, ...]
    code: int = 3
    loads: bool = True
    dry: bool = True


def loss(plugin: str, name: str, target: str = "good", more: str = "") -> str:
    return ONE.format(plugin=plugin, name=name, target=target, more=more)


def names(section: str, name: str) -> dict[str, Any]:
    return {section: [*([{"use": "mse"}] if section == "loss" else []), {"use": name}]}


ZOO = {
    "import": Animal(
        "raise RuntimeError('no licence')",
        names("loss", "import.thing"),
        ("RuntimeError: no licence", "upgrade saekit-import", "--no-plugin import"),
        loads=False,
    ),
    "registration": Animal(
        loss("registration", "registered").replace("    yield", "    {}['table']\n    yield"),
        names("loss", "registration.registered"),
        ("KeyError: 'table'", "upgrade saekit-registration", "--no-plugin registration"),
        loads=False,
    ),
    "misspelt": Animal(
        loss("misspelt", "thing").replace("saekit_losses", "saekit_loses"),
        names("loss", "misspelt.thing"),
        ("'saekit_loses' is not a hook", "Did you mean 'saekit_losses'", "upgrade saekit-misspelt"),
        loads=False,
    ),
    "argument": Animal(
        loss("argument", "thing").replace("saekit_losses()", "saekit_losses(registry)"),
        names("loss", "argument.thing"),
        ("'saekit_losses' asks for an argument 'registry'", "It has: none", "upgrade saekit-argument"),
        loads=False,
    ),
    "newer": Animal(
        "SAEKIT_CONTRACT = 99\n" + loss("newer", "newer_thing"),
        names("loss", "newer.newer_thing"),
        ("made for contract 99", f"this saekit has contract {CONTRACT}", "Upgrade saekit, install an earlier saekit-newer"),
        loads=False,
    ),
    "older": Animal(
        "SAEKIT_CONTRACT = 0\n" + loss("older", "older_thing"),
        names("loss", "older.older_thing"),
        ("made for contract 0", f"supports {OLDEST} to {CONTRACT}", "Contract 1: The first version.", "upgrade saekit-older"),
        loads=False,
    ),
    "words": Animal(
        "SAEKIT_CONTRACT = '1'\n" + loss("words", "thing"),
        names("loss", "words.thing"),
        ("SAEKIT_CONTRACT is '1', but a whole number is wanted", "upgrade saekit-words"),
        loads=False,
    ),
    "stepper": Animal(
        loss("stepper", "raises_in_a_step", "raises"),
        names("loss", "raises_in_a_step"),
        ("KeyError: 'the table that it was promised'", "Fix it, or leave 'raises_in_a_step' out"),
        dry=False,
    ),
    "listener": Animal(
        LISTENER.format(name="raises_in_step_three", target="Raises"),
        names("callback", "raises_in_step_three"),
        ("step_ended: ZeroDivisionError: in step three", "fix it or leave 'callback.raises_in_step_three' out"),
        dry=False,
    ),
    "lifecycle": Animal(
        LISTENER.format(name="misspells", target="Misspells"),
        names("callback", "misspells"),
        ("'step_end' is not a lifecycle hook", "Did you mean 'step_ended'"),
        dry=False,
    ),
    "greedy": Animal(
        LISTENER.format(name="asks_for_more", target="AsksForMore"),
        names("callback", "asks_for_more"),
        ("'step_ended' asks for an argument 'trainr'", "Did you mean 'trainer'", "It has: trainer, number"),
        dry=False,
    ),
    "needy": Animal(
        loss("needy", "needs_the_moon", more=", needs=('moonlight',)"),
        names("loss", "needs_the_moon"),
        ("needs 'moonlight'", "No installed plugin provides it", "leave 'needs_the_moon' out of the run"),
        code=2,
    ),
    "untyped": Animal(
        loss("untyped", "has_no_types", "untyped"),
        names("loss", "has_no_types"),
        ("option 'eps' has no type", "Annotate it, for example `eps: float`"),
    ),
    "absent": Animal(
        loss("absent", "has_no_target", "nowhere"),
        names("loss", "has_no_target"),
        ("no attribute 'nowhere'", "Fix or upgrade saekit-absent"),
    ),
    "twin_one": Animal(
        loss("twin_one", "claimed_twice"),
        names("loss", "claimed_twice"),
        ("two plugins offer a loss", "twin_two.claimed_twice (saekit-twin_two 0.9)", "Name the one you mean in full"),
        code=2,
    ),
    "twin_two": Animal(
        loss("twin_two", "claimed_twice"),
        names("loss", "claimed_twice"),
        ("two plugins offer a loss", "twin_one.claimed_twice (saekit-twin_one 0.9)", "Name the one you mean in full"),
        code=2,
    ),
}  # fmt: skip


@pytest.fixture
def zoo(fakes: Fakes) -> Fakes:
    """All of them, and one that prints at its import, at its registration, and when its target is imported."""
    (fakes.site / "zoo_targets.py").write_text(TARGETS, encoding="utf-8")
    (fakes.site / "zoo_listeners.py").write_text(LISTENERS, encoding="utf-8")
    fakes.modules |= {"zoo_targets", "zoo_listeners"}
    for name, animal in ZOO.items():
        fakes.install(f"saekit-{name}", "0.9", name, f"zoo_{name}", **{f"zoo_{name}": animal.source})
    loud = "print('noise of an import')\n" + loss("loud", "loud").replace("    yield", "    print('noise')\n    yield")
    fakes.install("saekit-loud", "0.9", "loud", "zoo_loud", zoo_loud=loud)
    return fakes


def test_a_run_that_names_none_of_them_works(
    zoo: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    done = command("run", run_file(), "--directory", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["warnings"] == [] or not any("zoo" in w or "0.9" in w for w in summary["warnings"])
    assert {plugin["name"] for plugin in summary["plugins"]} == {"builtin"}
    assert not {"zoo_targets", "zoo_listeners"} & sys.modules.keys()


@pytest.mark.parametrize("name", ZOO)
def test_a_run_that_names_one_is_told_plugin_distribution_cause_and_fix(
    name: str, zoo: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    animal = ZOO[name]
    changes = animal.names if "loss" in animal.names else {**animal.names, "loss": [{"use": "mse"}]}
    dry = ["--dry-run"] if animal.dry else ["--directory", tmp_path / "run"]
    done = command("run", run_file(**changes), *dry)
    assert done.code == animal.code, done.err
    done.says(name, f"saekit-{name} 0.9", *animal.says)


def test_all_of_them_are_listed_with_what_is_wrong_and_one_command_leaves_one_out(
    zoo: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path]
) -> None:
    listed = command("plugins", "--json")
    assert listed.code == 0
    found = {plugin["name"]: plugin for plugin in json.loads(listed.out)["plugins"]}
    for name, animal in ZOO.items():
        assert (found[name]["error"] is None) == animal.loads, name
        assert (found[name]["fix"] is None) == animal.loads, name
        if not animal.loads:
            assert f"--no-plugin {name}" in found[name]["fix"]
    assert found["newer"]["contract"] == 99 and "made for contract 99" in found["newer"]["error"]
    plain = command("plugins")
    assert "failed to load: newer (saekit-newer 0.9)" in plain.out and "Upgrade saekit, install an earlier" in plain.out
    twice = run_file(loss=[{"use": "claimed_twice"}])
    assert command("run", twice, "--dry-run", "--no-plugin", "twin_two").code == 0


def test_what_they_print_stays_out_of_every_document(
    zoo: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path]
) -> None:
    for arguments in (["plugins", "--json"], ["plugins", "show", "loud", "--json"], ["plugins", "--requirements", "--json"],
                      ["run", run_file(), "--loss", "loud", "--dry-run", "--json"]):  # fmt: skip
        zoo.forget()
        done = command(*arguments)
        json.loads(done.out)
        assert "noise of an import" in done.err


def test_one_that_imports_torch_to_be_listed_is_found_out_by_name(
    fakes: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path]
) -> None:
    fakes.install("saekit-heavy", "0.9", "heavy", "zoo_heavy", zoo_heavy="import torch\n" + loss("heavy", "heavy"))
    code = "import sys; from saekit.cli import main; sys.argv = ['saekit', 'plugins', *sys.argv[1:]]; main()"
    listed = python(code, "--json", environment=fakes.environment)
    (heavy,) = [p for p in json.loads(listed.stdout)["plugins"] if p["name"] == "heavy"]
    assert "torch" in heavy["imports"] and heavy["error"] is None
    plain = python(code, environment=fakes.environment).stdout
    assert "plugin 'heavy' (saekit-heavy 0.9): imports torch" in plain and "Move what needs it" in plain
    assert command("run", run_file(), "--dry-run").code == 0


def test_no_animal_of_the_zoo_is_left_behind() -> None:
    assert not {f"saekit-{name}" for name in ZOO} & {plugin.distribution for plugin in Registry().plugins}
