"""Nothing that a file, a name or another's error holds controls the terminal, whichever command shows it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Outcome

from saekit.terminal import output

ROOT = Path(__file__).parents[2] / "saekit"
EVIL = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202etxt\r\b"
"""Colour, the window's title, C1's clear screen, writing from right to left, back to the line's start."""
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

PLUGIN = f'''
from saekit import Component, hookimpl

def evil(step, *, size: int = 1, word: str = {EVIL!r}):
    """A loss {EVIL!s}"""
    raise ValueError({EVIL!r})

@hookimpl
def saekit_losses():
    yield Component("evil", evil)
'''
BROKEN = f"raise ValueError({EVIL!r})"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", f"{EVIL}.toml"],
        [f"run{EVIL}"],
        ["run", f"--{EVIL}"],
        ["run", "--dry-run", "-o", f"{EVIL}=1"],
        ["run", "--dry-run", "-o", f'recipe="{EVIL}"'],
        ["run", "--dry-run", "--json", "-o", "recipe=\x9b\u202e"],
        ["run", "--resume", EVIL],
        ["run", "--dry-run", "--plugin", "broken.py"],
        ["plugins", "--plugin", "evil.py"],
        ["plugins", "--json", "--plugin", "evil.py"],
        ["plugins", "--plugin", "evil.py", "show", "evil"],
        ["plugins", "--plugin", "evil.py", "show", "evil", "--json"],
        ["plugins", "--plugin", "broken.py"],
        ["check", "--plugin", "evil.py", "evil"],
        ["check", EVIL],
        ["compare", EVIL],
        ["report", EVIL],
        ["import", EVIL, "there"],
        ["new", "loss", EVIL],
    ],
    ids=lambda arguments: " ".join(arguments).encode("ascii", "ignore").decode().translate(dict.fromkeys(range(32))),
)
def test_no_command_shows_a_control_character(
    arguments: list[str], command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(PLUGIN, encoding="utf-8")
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    outcome = command(*arguments)
    assert not CONTROLS.search(outcome.out + outcome.err), outcome
    if "--json" in arguments:
        json.loads(outcome.out)


def test_rich_shows_none_and_keeps_its_own_codes() -> None:
    from rich.table import Table
    from rich.text import Text

    file = io.StringIO()
    drawn = output.console(file=file, force_terminal=True, width=80)
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(Text(EVIL, style="bold"))
    drawn.print(table)
    drawn.print(EVIL, markup=False)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue().replace("\x1b[31mred", "not ours"))
    assert "not ours" not in shown and not CONTROLS.search(shown)
    assert "\x1b[1m" in file.getvalue()  # rich's own bold


def test_lines_and_tabs_are_kept_and_halves_of_pairs_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    output.echo("one\n\ttwo\ud800")
    output.echo_json({"a": "\ud800\x9b\x1b", "b": "schön"})
    first, _, document = capsys.readouterr().out.partition("{")
    assert first == "one\n\ttwo\N{REPLACEMENT CHARACTER}\n"
    assert json.loads("{" + document) == {"a": "\ud800\x9b\x1b", "b": "schön"} and "schön" in document


def test_there_is_no_other_door() -> None:
    """Whatever prints in the rooms of the command line and the terminal does it through `output.py`."""
    elsewhere = re.compile(r"click\.s?echo\(|(?<![\w.])print\(|(?<![\w.])Console\(|sys\.std(out|err)\.write")
    files = [*(ROOT / "cli").glob("*.py"), *(ROOT / "terminal").glob("*.py")]
    found = [
        f"{path.name}: {line.strip()}"
        for path in files
        if path.name != "output.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if elsewhere.search(line) and 'print(seconds, *(name' not in line  # the program that doctor hands to a subprocess
    ]
    assert found == []
