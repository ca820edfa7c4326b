"""`saekit doctor`: what it finds in an installation that is in order, and in one that is not."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Fakes, Outcome, python

from saekit.cli.doctor import version_conflicts

DECLARES = """
from saekit import Component, hookimpl

@hookimpl
def saekit_losses():
    yield Component("thing", "saekit.builtin.losses:mse", "A loss.")
"""


def require(fakes: Fakes, distribution: str, *requirements: str) -> None:
    """Let an installed fake ask for packages."""
    (info,) = fakes.site.glob(f"{distribution.replace('-', '_')}-*.dist-info")
    lines = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    with (info / "METADATA").open("a", encoding="utf-8") as file:
        file.write(lines)


def test_all_is_well_here(command: Callable[..., Outcome]) -> None:
    done = command("doctor", "--json")
    assert done.code == 0, done.out + done.err
    found = json.loads(done.out)
    assert found["saekit"] == importlib.metadata.version("saekit")
    assert found["torch"] == torch.__version__
    assert found["devices"][0] == "cpu" and found["threads"] >= 1 and found["processors"] >= 1
    assert found["large_pages"].keys() == {"asked", "system", "used"}
    assert found["conflicts"] == [] and found["problems"] == []
    plugins = {plugin["name"]: plugin for plugin in found["plugins"]}
    assert plugins["builtin"]["components"] > 30
    assert 0 <= plugins["builtin"]["import_seconds"] < 60 and plugins["builtin"]["imports"] == []
    assert "All is well." in command("doctor").out


def test_a_broken_plugin_is_told_with_its_fix_and_the_exit_code_says_so(
    fakes: Fakes, command: Callable[..., Outcome]
) -> None:
    fakes.install("saekit-broken", "0.9", "broken", "broken_plugin", broken_plugin="raise RuntimeError('no licence')")
    done = command("doctor", "--json")
    assert done.code == 3
    (problem,) = json.loads(done.out)["problems"]
    for words in (
        "plugin 'broken' (saekit-broken 0.9)",
        "RuntimeError: no licence",
        "upgrade saekit-broken",
        "--no-plugin broken",
    ):
        assert words in problem
    plain = command("doctor")
    assert plain.code == 3 and "saekit-broken 0.9: broken" in plain.out


def test_one_that_imports_torch_to_be_listed_or_is_slow_is_named(fakes: Fakes) -> None:
    fakes.install(
        "saekit-heavy", "0.9", "heavy", "heavy_plugin", heavy_plugin="print('noise')\nimport torch\n" + DECLARES
    )
    fakes.install("saekit-slow", "0.9", "slow", "slow_plugin", slow_plugin="import time\ntime.sleep(0.8)\n" + DECLARES)
    done = python(
        "import sys; from saekit.cli import main; sys.argv = ['saekit', 'doctor', '--json']; main()",
        environment=fakes.environment,
    )
    found = json.loads(done.stdout)
    plugins = {plugin["name"]: plugin for plugin in found["plugins"]}
    assert "torch" in plugins["heavy"]["imports"] and plugins["slow"]["imports"] == []
    assert plugins["slow"]["import_seconds"] >= 0.8
    assert any("plugin 'heavy' (saekit-heavy 0.9) imports torch" in problem for problem in found["problems"])
    assert any("plugin 'slow' (saekit-slow 0.9) takes 0." in problem for problem in found["problems"])


def test_versions_that_do_not_fit_are_told_with_what_to_install(fakes: Fakes, command: Callable[..., Outcome]) -> None:
    fakes.install("saekit-acme", "0.3", "acme", "acme_plugin", acme_plugin=DECLARES)
    require(fakes, "saekit-acme", "click>=99", "a-package-that-is-not-there>=2", "torch>=2", "absent; extra == 'more'")
    done = command("doctor", "--json")
    assert done.code == 2
    conflicts = json.loads(done.out)["conflicts"]
    assert len(conflicts) == 2
    version = importlib.metadata.version("click")
    assert f"saekit-acme asks for click>=99, but click {version} is installed: pip install 'click>=99'" in conflicts
    assert any("a-package-that-is-not-there>=2, which is not installed" in conflict for conflict in conflicts)


def test_what_is_needed_in_turn_is_looked_at_with_its_extras(fakes: Fakes) -> None:
    fakes.install("saekit-acme", "0.3", "acme", "acme_plugin", acme_plugin=DECLARES)
    fakes.install("middle", "1.0", "middle", "acme_plugin")
    require(fakes, "saekit-acme", "middle[more]", "saekit-acme")
    require(fakes, "middle", "click>=99; extra == 'more'", "rich>=99; extra == 'other'", "not a requirement")
    found = sorted(version_conflicts({"saekit-acme"}))
    assert len(found) == 2
    assert found[0].startswith("middle asks for 'not a requirement', which is not a requirement")
    assert found[1].startswith("middle asks for click>=99")


@pytest.mark.parametrize(
    ("system", "asked", "used"), [("madvise", "1", True), ("never", "1", False), ("always", "0", False)]
)
def test_large_pages_are_used_where_both_agree(
    system: str,
    asked: str,
    used: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: Callable[..., Outcome],
) -> None:
    setting = tmp_path / "enabled"
    setting.write_text(" ".join(f"[{w}]" if w == system else w for w in ("always", "madvise", "never")) + "\n")
    monkeypatch.setattr("saekit.cli.doctor.LARGE_PAGES", setting)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", asked)
    found = json.loads(command("doctor", "--json").out)["large_pages"]
    assert found == {"asked": asked == "1", "system": system, "used": used}
