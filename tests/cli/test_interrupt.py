"""Ctrl-C in training saves a checkpoint, says how to go on, and going on ends at the same bits."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Outcome, Running, leftovers, logged, running, weights

STEPS = 400
# The callback waits where the test asks it to, so that the signal meets a known phase whatever the machine is busy with.
WAITS = '''
import pathlib
import time
from saekit import Component, hookimpl

class Waits:
    """Says that it is there, and waits until the file is gone."""

    def __init__(self, *, hook: str, file: str, step: int = 0):
        self.hook, self.file, self.step = hook, pathlib.Path(file), step

    def wait(self):
        if self.file.exists():
            self.file.with_suffix(".there").touch()
        while self.file.exists():
            time.sleep(0.01)

    @hookimpl
    def step_ended(self, number):
        if self.hook == "step_ended" and number == self.step:
            self.wait()

    @hookimpl
    def phase_started(self, phase):
        if self.hook == phase:
            self.wait()

@hookimpl
def saekit_callbacks():
    yield Component("waits", Waits)
'''


def started(process: Running, file: Path) -> None:
    """Wait until the run has come to the place where it waits."""
    for _ in range(12_000):
        if file.with_suffix(".there").exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the run never came to its place")


def interrupted(
    arguments: list, hook: str, tmp_path: Path, times: int = 1, step: int = 0, number: int = signal.SIGINT
) -> tuple[int, str, str]:
    """Run until `hook`, send the signal so many times, let it go on; exit code, stdout and stderr."""
    gate = tmp_path / "gate"
    gate.touch()
    use = f"waits:hook={hook},file={gate},step={step}"
    with running(*arguments, "--callback", use) as process:
        started(process, gate)
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.3)
        gate.unlink()
        out, err = process.communicate(timeout=180)
    return process.returncode, out, err


@pytest.fixture
def arguments(run_file: Callable[..., Path], plugin_file: Callable[[str, str], Path], tmp_path: Path) -> list:
    """A run of 400 steps whose next checkpoint would be far away."""
    file = run_file(training__tokens=STEPS * 64, training__checkpoint_every=1000, training__log_every=10)
    return ["run", file, "--plugin", plugin_file("waits", WAITS), "--directory", tmp_path / "run"]


def test_an_interrupted_run_goes_on_to_the_same_bits(arguments: list, command: Callable[..., Outcome], tmp_path: Path) -> None:
    run, gate = tmp_path / "run", tmp_path / "gate"
    code, out, err = interrupted(arguments, "step_ended", tmp_path, step=123)
    assert code == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert f"interrupted after step 124 of {STEPS}" in err
    assert f"saekit run --resume {run}" in err
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000124"]
    assert not (run / "summary.json").exists()
    assert not leftovers(tmp_path)

    resumed = command("run", "--resume", run, "--json")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["tokens"] == STEPS * 64
    use = f"waits:hook=step_ended,file={gate},step=123"
    assert command(*arguments[:-1], tmp_path / "undisturbed", "--callback", use).code == 0
    assert weights(run) == weights(tmp_path / "undisturbed")
    assert [line["step"] for line in logged(run)] == list(range(9, STEPS, 10))
    kept = json.loads((run / "provenance.json").read_text())
    assert len(kept["resumed"]) == 1
    assert kept["command"] != kept["resumed"][0]["command"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_save_a_checkpoint_however_often_they_come(number: int, arguments: list, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = interrupted(arguments, "step_ended", tmp_path, times=2, step=7, number=number)
    assert code == 128 + number, err
    assert out == ""
    assert f"interrupted by {signal.Signals(number).name} after step 8 of {STEPS}" in err
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000008"]


SLOW_SOURCE = """
import time
from saekit import Component, hookimpl
from saekit.activations.shuffle import stop_point
from saekit.builtin.sources import SyntheticSource

class Slow(SyntheticSource):
    def __init__(self, *, gate: str):
        super().__init__(d_in=8, n_features=16)
        self.gate = gate

    def blocks(self, split, *, size, seed, start=0):
        for number, block in enumerate(super().blocks(split, size=size, seed=seed, start=start), start):
            if number == 2 and split == "train":
                open(self.gate, "w").close()
                for _ in range(600):
                    stop_point()
                    time.sleep(0.1)
            yield block

@hookimpl
def saekit_sources():
    yield Component("slow", Slow)
"""


def test_a_checkpoint_does_not_wait_for_the_harvest(
    run_file: Callable[..., Path], plugin_file: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """The signal comes while training waits for block 2: both blocks before it are trained on, and saved."""
    gate, run, began = tmp_path / "gate", tmp_path / "run", time.monotonic()
    source = {"use": "slow", "gate": str(gate.with_suffix(".there"))}
    file = run_file(source=source, training__tokens=STEPS * 64, training__checkpoint_every=1000)
    with running("run", file, "--plugin", plugin_file("slow", SLOW_SOURCE), "--directory", run) as process:
        started(process, gate)
        time.sleep(1.0)  # until the blocks that are there have been trained on
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=180)
    assert process.returncode == 143, err
    done = len(logged(run))
    assert f"interrupted by SIGTERM after step {done} of {STEPS}" in err
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize(("hook", "times"), [("prepare", 1), ("step_ended", 2), ("evaluate", 1), ("analyse", 1)])
def test_elsewhere_or_pressed_twice_it_stops_at_once(
    hook: str, times: int, arguments: list, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments += ["-o", "training.tokens=1280"]
    code, out, err = interrupted(arguments, hook, tmp_path, times, step=7)
    assert code == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert f"saekit run --resume {run}" in err
    assert not leftovers(tmp_path)
    assert command("run", "--resume", run).code == 0
    assert (run / "summary.json").is_file()


@pytest.mark.slow
def test_a_run_that_only_analyses_stops_at_once(
    run_file: Callable[..., Path], plugin_file: Callable[[str, str], Path], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    """It has no training whose step could be waited for."""
    assert command("run", run_file(), "--directory", tmp_path / "first").code == 0
    file = run_file(architecture={"use": "topk", "from": str(tmp_path / "first" / "sae")}, training__tokens=0)
    run = tmp_path / "run"
    arguments = ["run", file, "--plugin", plugin_file("waits", WAITS), "--directory", run]
    code, _, err = interrupted(arguments, "evaluate", tmp_path)
    assert code == 130, err
    assert command("run", "--resume", run).code == 0
    assert weights(run) == weights(tmp_path / "first")


def test_ctrl_c_before_the_run_begins_is_an_interruption_too(arguments: list, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    with running(*arguments, "--plugin", tmp_path / "slow.py") as process:
        _, err = process.communicate(timeout=180)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
