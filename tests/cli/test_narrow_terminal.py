"""What the commands list fits a terminal of 80 columns, without a break inside a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Outcome

from saekit.plugins import Registry

BAD = '''
from collections.abc import Iterator
from saekit import Component, hookimpl

def bad(step):
    raise ValueError("the lamp went out")

@hookimpl
def saekit_losses() -> Iterator[Component]:
    yield Component("bad", bad, "A loss.")
'''


@pytest.mark.parametrize("arguments", [["plugins"], ["recipes"], ["run", "quickstart", "--dry-run"]], ids=" ".join)
def test_lists_fit_and_break_between_words(
    arguments: list[str], command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    narrow = command(*arguments)
    monkeypatch.setenv("COLUMNS", "2000")
    wide = command(*arguments)
    assert narrow.code == wide.code == 0
    assert max(len(line) for line in narrow.out.splitlines()) <= 80
    assert narrow.out.split() == wide.out.split(), "a word was broken"
    if arguments == ["plugins"]:
        listed = " ".join(narrow.out.split())
        for component in Registry().components():
            assert f"{component.name} {component.summary} [{component.distribution} {component.version}]" in listed


def test_check_says_each_cause_once_with_the_checks_that_it_failed(
    command: Callable[..., Outcome], plugin_file: Callable[[str, str], Path]
) -> None:
    done = command("check", "bad", "--plugin", plugin_file("bad", BAD))
    assert done.code == 3
    said = done.out + done.err
    assert said.count("the lamp went out") == 1
    (line,) = [line for line in done.err.splitlines() if "the lamp went out" in line]
    failed = [line.split()[1] for line in done.out.splitlines() if line.split()[0] == "failed"]
    assert len(failed) > 5
    assert ", ".join(failed) in line
