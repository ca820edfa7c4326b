"""Commands that plugins add: listed without an import, called like saekit's own, and never in the way of those."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Fakes, Outcome, python

DECLARES = """
from saekit import Command, hookimpl

@hookimpl
def saekit_commands():
    yield Command({name!r}, "{module}_cli:{attribute}", "Greets.")
"""
TARGET = """
import click

@click.command()
@click.option("--name", default="you", help="Whom.")
def command(name):
    "Greet somebody."
    click.echo(f"hello {name}")

number = 3
"""


@pytest.fixture
def add(fakes: Fakes) -> Callable[..., Fakes]:
    """Install a plugin that adds a command."""

    def add(name: str = "greet", plugin: str = "acme", attribute: str = "command", target: str = TARGET) -> Fakes:
        text = DECLARES.format(name=name, module=plugin, attribute=attribute)
        fakes.install(f"saekit-{plugin}", "0.3", plugin, plugin, **{plugin: text, f"{plugin}_cli": target})
        return fakes

    return add


def test_it_is_listed_without_its_target_and_called_with_its_options(
    add: Callable[..., Fakes], command: Callable[..., Outcome]
) -> None:
    fakes = add()
    code = """
        import sys
        from saekit.cli import main
        sys.argv = ["saekit", "--help"]
        try:
            main()
        finally:
            print("IMPORTED", [name for name in ("acme_cli", "torch") if name in sys.modules])
        """
    done = python(code, environment=fakes.environment)
    assert "greet    Greets." in done.stdout and "IMPORTED []" in done.stdout
    assert command("greet", "--name", "world").out == "hello world\n"
    assert "Greet somebody." in command("greet", "--help").out


def test_a_broken_plugin_leaves_help_whole_and_is_named_where_a_command_is_missing(
    fakes: Fakes, command: Callable[..., Outcome]
) -> None:
    fakes.install("saekit-broken", "0.9", "broken", "broken_plugin", broken_plugin="raise RuntimeError('no licence')")
    listed = command("--help")
    assert listed.code == 0 and "doctor" in listed.out and "bench" in listed.out
    done = command("greet")
    assert done.code == 3
    done.says("no command 'greet'", "plugin 'broken' (saekit-broken 0.9)", "RuntimeError: no licence")


def test_a_command_of_saekit_itself_stays_its_own(add: Callable[..., Fakes], command: Callable[..., Outcome]) -> None:
    add("recipes")
    listed = command("--help")
    told = " ".join(listed.out.split())
    assert "plugin 'acme' (saekit-acme 0.3) declares a command 'recipes', which saekit has itself" in told
    assert "Greets." not in told
    assert "quickstart" in command("recipes").out
    assert any("declares a command 'recipes'" in problem for problem in json.loads(command("doctor", "--json").out)["problems"])


def test_two_plugins_with_one_command_are_both_named(
    add: Callable[..., Fakes], command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(plugin="acme")
    add(plugin="rival")
    both = ("plugin 'acme' (saekit-acme 0.3)", "plugin 'rival' (saekit-rival 0.3)", "SAEKIT_DISABLE_PLUGINS=acme")
    listed = " ".join(command("--help").out.split())
    assert all(words in listed for words in both) and "Greets." not in listed
    done = command("greet")
    assert done.code == 2
    done.says(*both)
    monkeypatch.setenv("SAEKIT_DISABLE_PLUGINS", "acme")
    assert command("greet").out == "hello you\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "import not_there"}, ("ModuleNotFoundError", "not_there")),
        ({"attribute": "absent"}, ("AttributeError", "absent")),
        ({"attribute": "number"}, ("is int, not a click command",)),
    ],
)
def test_a_target_that_cannot_be_used_is_the_plugins_error(
    changes: dict[str, str], words: tuple[str, ...], add: Callable[..., Fakes], command: Callable[..., Outcome]
) -> None:
    add(**changes)
    assert "Greets." in command("--help").out
    done = command("greet")
    assert done.code == 3
    done.says("command 'greet' of plugin 'acme' (saekit-acme 0.3)", *words)
    checked = command("check", "acme")
    assert checked.code == 3
    checked.says("shows_its_help", *words)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ("'greet'", "must yield saekit.Command, not str"),
        ("Command('Greet', 'a:b', '')", "'Greet' is not a name for a command"),
        ("Command('greet', 'a', '')", "must be a string 'package.module:command'"),
    ],
)
def test_a_declaration_that_is_wrong_is_the_plugins_error(
    declared: str, words: str, fakes: Fakes, command: Callable[..., Outcome]
) -> None:
    text = f"from saekit import Command, hookimpl\n\n@hookimpl\ndef saekit_commands():\n    yield {declared}\n"
    fakes.install("saekit-acme", "0.3", "acme", "acme", acme=text)
    assert words in command("plugins").out
    assert command("--help").code == 0


def test_a_file_cannot_add_a_command(tmp_path: Path, command: Callable[..., Outcome]) -> None:
    file = tmp_path / "acme.py"
    file.write_text(DECLARES.format(name="greet", module="acme", attribute="command"), encoding="utf-8")
    done = command("plugins", "--plugin", file)
    assert "a file cannot add a command" in done.out


def test_an_unknown_command_is_told_its_neighbours(command: Callable[..., Outcome]) -> None:
    done = command("benhc")
    assert done.code == 2
    done.says("There is no command 'benhc'.", "Did you mean 'bench'")
