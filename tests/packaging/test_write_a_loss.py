"""docs/write-a-loss.md, from top to bottom: every file is written where it says, every command carried out as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from environments import ROOT, Environment

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "write-a-loss.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE)


def as_a_user(there: Environment) -> dict[str, str]:
    """The environment as `activate` makes it. pip is told to take nothing from a network and nothing that is not named."""
    pip = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # 0: no isolation (sic)
    return {**there.variables, **pip, "PATH": f"{there.path / 'bin'}{os.pathsep}{there.variables['PATH']}"}


@pytest.fixture(scope="module")
def walked(environment: Callable[[str], Environment], wheels: dict[str, Path]) -> tuple[Environment, dict[str, str]]:
    """The place where all was carried out, and what each command printed."""
    there = environment("walk")
    there.install(wheels["saekit"], wheels["saekit_revival"])
    variables, said = as_a_user(there), {}
    for language, title, text in BLOCKS:
        if language == "sh":
            for line in text.splitlines():
                done = subprocess.run(line, shell=True, cwd=there.place, env=variables, capture_output=True, text=True, timeout=600)
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
                said[line] = done.stdout + done.stderr
        elif language == "python":
            assert (there.place / "saekit-mine" / title).is_file(), "the page names a file that saekit new did not write"
            if "out of limits" not in said:  # of the package as it is written
                said["out of limits"] = there.saekit("run", "saekit-mine/run.toml", "-o", "loss.mine.scale=-1", code=2).stderr
            (there.place / "saekit-mine" / title).write_text(text, encoding="utf-8")
            if "eps" in text and title.endswith("loss.py"):
                old = there.saekit("run", "saekit-mine/run.toml", code=2).stderr
                assert "has no option 'scale'" in old
                assert "Its options: eps" in old
                file = there.place / "saekit-mine" / "run.toml"
                run_file = file.read_text(encoding="utf-8")
                assert "scale = 0.5" in run_file
                file.write_text(run_file.replace("scale = 0.5", "eps = 1e-8"), encoding="utf-8")  # as the text below says
        else:
            assert language in ("text", "toml")
    return there, said


def test_every_command_of_the_page_is_among_them(walked: tuple[Environment, dict[str, str]]) -> None:
    said = walked[1]
    assert {line.split()[1] for line in said if line.startswith("saekit")} == {"new", "plugins", "run", "compare", "check"}
    assert {line.split()[1] for line in said if line.startswith("pip")} == {"install", "wheel", "uninstall"}
    assert " passed" in said["python -m pytest saekit-mine"]
    assert "failed" not in said["python -m pytest saekit-mine"]


def test_the_written_files_are_those_of_the_page(walked: tuple[Environment, dict[str, str]]) -> None:
    (tree,) = [text for language, _, text in BLOCKS if language == "text"]
    names = [line.split()[0] for line in tree.splitlines()[1:]]
    package = walked[0].place / "saekit-mine"
    ours = [path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sorted(names) == sorted(path.as_posix() for path in ours if not path.parts[0].startswith("."))  # .pytest_cache


def test_a_stronger_weight_leaves_fewer_latents_active(walked: tuple[Environment, dict[str, str]]) -> None:
    weak, strong = (
        json.loads((walked[0].place / "runs" / name / "summary.json").read_text(encoding="utf-8"))["metrics"]
        for name in ("weak", "strong")
    )
    assert strong["l0"] < 0.9 * weak["l0"]
    assert 0 < strong["explained_variance"] < weak["explained_variance"]


def test_the_installed_wheel_is_what_was_checked_last(walked: tuple[Environment, dict[str, str]]) -> None:
    there = walked[0]
    file = there.python("-c", "import saekit_mine; print(saekit_mine.__file__)").stdout.strip()
    assert there.path in Path(file).parents
    done = there.saekit("run", "saekit-mine/run.toml", "-o", "loss.mine.eps=-1", code=2)
    assert "loss.mine.eps: Input should be greater than 0" in done.stderr


def test_an_option_out_of_its_limits_is_refused_as_the_page_says(walked: tuple[Environment, dict[str, str]]) -> None:
    (sentence,) = re.findall(r"\(`(loss\.mine\.scale: [^`]+)`\)", PAGE)
    assert sentence in walked[1]["out of limits"]
