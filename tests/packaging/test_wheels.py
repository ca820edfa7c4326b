"""The wheels hold all that is needed: they are installed where nothing of the repository can be seen, and there a plugin
of somebody else's works, a killed run goes on, and a run file whose plugin is gone says what to install."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from environments import PROJECTS, ROOT, Environment
from helpers import logged, weights

pytestmark = pytest.mark.slow

STEPS, BATCH = 120, 128
RUN = {
    "requires": ["saekit-hoyer"],
    "source": {"use": "organism", "hook_point": "blocks.1.hook_out", "kinds": ["facts", "sycophancy"]},  # soon parsed
    "architecture": {"use": "topk", "d_sae": 256, "k": 8},
    "loss": [{"use": "mse"}, {"use": "hoyer", "weight": 0.001}],
    "metric": [{"use": "hoyer_sparsity"}],
    "callback": [{"use": "resample", "every": 50}],
    "training": {
        "tokens": STEPS * BATCH,
        "batch_size": BATCH,
        "buffer": 4096,
        "checkpoint_every": 20,
        "log_every": 10,
        "device": "cpu",
    },
    "evaluation": {"tokens": 1000},
}


@pytest.fixture(scope="module")
def installed(environment: Callable[[str], Environment], wheels: dict[str, Path]) -> Environment:
    """An environment with every wheel of the repository, and a run file in its place."""
    made = environment("wheels")
    made.install(*wheels.values())
    (made.place / "run.toml").write_text(tomli_w.dumps(RUN), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def undisturbed(installed: Environment) -> Path:
    """The directory of the run file's run, from beginning to end."""
    installed.saekit("run", "run.toml", "--directory", "undisturbed")
    return installed.place / "undisturbed"


def test_each_project_has_a_wheel(wheels: dict[str, Path]) -> None:
    assert len(wheels) == len(PROJECTS)
    assert {"saekit", "saekit_hoyer"} < set(wheels)


def test_the_wheel_holds_every_file_of_the_package(wheels: dict[str, Path]) -> None:
    """Weights, templates, recipes, the report's page, the marker of types: whatever git has or would take."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "saekit"], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    with zipfile.ZipFile(wheels["saekit"]) as wheel:
        held = set(wheel.namelist())
        metadata = wheel.read(next(name for name in held if name.endswith(".dist-info/METADATA"))).decode()
    wanted = {line for line in listed.stdout.splitlines() if (ROOT / line).is_file()}
    assert wanted - held == set()
    for part in ("organism/weights/base/model.safetensors", "report/templates/layout.html", "builtin/recipes/quickstart.toml"):
        assert f"saekit/{part}" in held
    assert {"saekit/py.typed", "saekit/cli/templates/loss/loss.py.txt"} < held
    assert not [name for name in held if name.startswith(("tests", "docs", "plugins"))]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)
    assert "License-Expression: MIT" in metadata


def test_what_is_imported_is_the_wheels(installed: Environment) -> None:
    done = installed.python("-c", "import saekit, saekit_hoyer; print(saekit.__file__, saekit_hoyer.__file__, sep='\\n')")
    for line in done.stdout.splitlines():
        assert installed.path in Path(line).parents
        assert ROOT not in Path(line).resolve().parents


def test_every_plugin_is_listed_without_an_error(installed: Environment) -> None:
    listing = json.loads(installed.saekit("plugins", "--json").stdout)
    found = {plugin["distribution"]: plugin["error"] for plugin in listing["plugins"]}
    assert found == dict.fromkeys(["saekit", *(path.name for path in PROJECTS if path != ROOT)])
    (outside,) = [plugin for plugin in listing["plugins"] if plugin["distribution"] == "saekit-hoyer"]
    assert {c["name"] for c in outside["components"]} == {"hoyer", "hoyer_sparsity"}


def test_the_outside_plugin_passes_the_checks(installed: Environment) -> None:
    for done in installed.each(["check", "hoyer", "--json"], ["check", "hoyer_sparsity", "--json"]):
        assert done.code == 0, done.err
        (report,) = json.loads(done.out)
        assert report["ok"]
        assert report["distribution"] == "saekit-hoyer"


def test_its_own_tests_pass(installed: Environment) -> None:
    done = installed.python("-m", "pytest", "-p", "no:cacheprovider", ROOT / "docs" / "examples" / "saekit-hoyer")
    assert " passed" in done.stdout


def test_a_run_with_the_outside_loss(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text(encoding="utf-8"))
    assert 1 <= summary["losses"]["hoyer"] <= 8
    assert 0.5 < summary["metrics"]["hoyer_sparsity"] <= 1
    assert {"saekit", "saekit-hoyer", "saekit-revival"} <= {plugin["distribution"] for plugin in summary["plugins"]}
    assert "hoyer_sparsity" in (undisturbed / "report.html").read_text(encoding="utf-8")


def test_a_killed_run_goes_on_to_the_same_bits(installed: Environment, undisturbed: Path) -> None:
    run = installed.place / "killed"
    command = installed.command(installed.path / "bin" / "saekit", "run", "run.toml", "--directory", run)
    process = subprocess.Popen(
        command, cwd=installed.place, env=installed.variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not list(run.glob("checkpoints/step-*")):
            assert process.poll() is None, "it ended before its first checkpoint"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (run / "summary.json").exists()
    installed.saekit("run", "--resume", run)
    assert weights(run) == weights(undisturbed)
    assert [line["step"] for line in logged(run)] == [line["step"] for line in logged(undisturbed)]


def test_without_the_outside_plugin_the_run_file_says_what_to_install(
    environment: Callable[[str], Environment], wheels: dict[str, Path], undisturbed: Path
) -> None:
    """Installed, then taken away by pip; in an environment of its own, so that the other tests still have it."""
    bare = environment("bare")
    bare.install(*wheels.values())
    (bare.place / "run.toml").write_text(tomli_w.dumps(RUN), encoding="utf-8")
    bare.saekit("run", "run.toml", "--dry-run")
    bare.python("-m", "pip", "uninstall", "--yes", "--quiet", "saekit-hoyer")
    plugins, missing, again = bare.each(
        ["plugins", "--json"],
        ["run", "run.toml"],
        ["run", undisturbed / "run.toml"],  # what a run writes down knows it as well
    )
    assert "hoyer" not in [plugin["name"] for plugin in json.loads(plugins.out)["plugins"]]
    assert (missing.code, again.code) == (2, 2)
    missing.says("loss.hoyer: there is no loss 'hoyer'", "pip install saekit-hoyer")
    again.says("pip install saekit-hoyer")
    assert "Traceback" not in missing.err
    assert not (bare.place / "runs").exists()
