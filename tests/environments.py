"""Wheels of everything in the repository, and virtual environments that hold nothing of it but what a test installs.

Fixtures here are taken into a folder's conftest by importing their names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers import Outcome

ROOT = Path(__file__).parents[1]
OUTSIDE = ROOT / "docs" / "examples" / "saekit-hoyer"
PROJECTS = [ROOT, *(path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))), OUTSIDE]


EACH = """
import contextlib, io, json, os, sys
from saekit.cli import main

said = []
for place, arguments in json.loads(sys.argv[1]):
    os.chdir(place)
    sys.argv = ["saekit", *arguments]
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    said.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(said))
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment at `path`; commands run in `place`, as a user's would."""

    path: Path
    place: Path

    def python(self, *arguments: Any, code: int | None = 0, at: Path | None = None) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS` to its end, in the folder `at`; its exit code must be `code` (None: any)."""
        done = subprocess.run(
            self.command(*arguments), cwd=at or self.place, env=self.variables, capture_output=True, text=True, timeout=600
        )
        assert code in (None, done.returncode), f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def saekit(self, *arguments: Any, code: int | None = 0, at: Path | None = None) -> subprocess.CompletedProcess[str]:
        """`saekit ARGUMENTS`, by the script that pip wrote."""
        return self.python(self.path / "bin" / "saekit", *arguments, code=code, at=at)

    def each(self, *commands: Sequence[Any], at: Sequence[Path] | None = None) -> list[Outcome]:
        """What each `saekit ARGUMENTS` comes to, one after the other in one process, since each imports torch."""
        places = at or [self.place] * len(commands)
        told = [[str(place), [*map(str, command)]] for place, command in zip(places, commands, strict=True)]
        return [Outcome(*said) for said in json.loads(self.python("-P", "-c", EACH, json.dumps(told)).stdout)]

    def install(self, *what: Path) -> None:
        """Install wheels or folders: nothing else, and nothing from a network."""
        self.python("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", *what)

    def command(self, *arguments: Any) -> list[str]:
        """The command line of `python ARGUMENTS`."""
        return [str(self.path / "bin" / "python"), *map(str, arguments)]

    @property
    def variables(self) -> dict[str, str]:
        """This process's environment, less what would lead Python elsewhere."""
        ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "SAEKIT_DISABLE_PLUGINS")
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        return {**kept, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel of each distribution of the repository, by the distribution's name with underscores; made by the first
    test process that asks for them."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheels"
    with FileLock(place.with_suffix(".lock")):
        if not (place / "done").exists():
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
            options = ["--no-build-isolation", "--no-index", "--wheel-dir", place]
            made = subprocess.run([*pip, *options, *PROJECTS], capture_output=True, text=True)
            assert made.returncode == 0, made.stderr
            (place / "done").touch()
    return {path.name.partition("-")[0]: path for path in place.glob("*.whl")}


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages around these tests, less what is of this repository: links, since torch is not installed in a second."""
    place = tmp_path_factory.mktemp("dependencies")
    for kind in ("purelib", "platlib"):
        for path in Path(sysconfig.get_path(kind)).iterdir():
            ours = "saekit" in path.name or path.suffix == ".pth" or path.name == "__pycache__"
            if not ours and not (place / path.name).exists():
                (place / path.name).symlink_to(path)
    return place


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory, dependencies: Path) -> Callable[[str], Environment]:
    """Makes a virtual environment in which saekit's dependencies are there, and saekit is not."""

    def make(name: str) -> Environment:
        path = tmp_path_factory.mktemp(name)
        venv.create(path / "env", with_pip=False)
        (site,) = path.glob("env/lib/python*/site-packages")
        # A plain path: the files *.pth of the folder it names, such as that of an editable saekit, are not read.
        (site / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
        pip = path / "env" / "bin" / "pip"
        pip.write_text(f"#!/bin/sh\nexec '{path / 'env' / 'bin' / 'python'}' -m pip \"$@\"\n", encoding="utf-8")
        pip.chmod(0o755)
        (path / "place").mkdir()
        return Environment(path / "env", path / "place")

    return make
