"""What no file of the repository may hold: a package index's host, a path of somebody's machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Written so that this file does not match itself.
FORBIDDEN = {
    "a package index": rb"py" + rb"pi\.org|python" + rb"hosted\.org|download\.py" + rb"torch\.org|index" + rb"-url",
    "a home directory": rb"/ho" + rb"me/\w|/ro" + rb"ot/[\w.]|/Us" + rb"ers/\w|[A-Z]:\\Us" + rb"ers\\",
    "a build machine's path": rb"(?<![\w.~<])/wo" + rb"rk/\w|/bui" + rb"lds/\w|/t" + rb"mp/\w",
}


def files() -> list[Path]:
    """Every file that git has or would take."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.decode().split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode(errors='replace')}"
        for path in files()
        if path.suffix != ".safetensors" and (match := pattern.search(path.read_bytes()))
    ]
    assert found == []


def test_the_two_commands_of_the_readme_are_those_of_ci() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make run" in readme
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(r"^make test$", readme, re.MULTILINE)
