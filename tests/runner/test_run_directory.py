"""A run directory belongs to one process at a time, and withdrawing a run that never began removes only what it made."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import Outcome, Running, listener_plugin, logged, running

from saekit.config import RunConfig
from saekit.errors import UsageError
from saekit.run_directory import RunDirectory

Run = Callable[..., Outcome]
Files = Callable[..., Path]
REFUSED = {"training__device": "cpu", "training__precision": "bf16"}  # seen when the run has begun


# --- withdrawing -------------------------------------------------------------------------------------------------


def test_a_refused_run_leaves_the_directory_that_the_user_made(command: Run, run_file: Files, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(mine)
    for place in (mine, link):
        assert command("run", run_file(**REFUSED), "--directory", place).code == 2
        assert mine.is_dir() and not list(mine.iterdir())
    assert link.is_symlink()


def test_a_refused_run_with_variants_leaves_nothing_else(command: Run, run_file: Files, tmp_path: Path) -> None:
    file = run_file(**REFUSED, variant=[{"name": "a"}, {"name": "b"}])
    assert command("run", file, "--directory", tmp_path / "new").code == 2
    assert not (tmp_path / "new").exists()


def test_a_directory_that_somebody_makes_meanwhile_stays(tmp_path: Path, run_config: RunConfig) -> None:
    with contextlib.suppress(UsageError), RunDirectory.create(run_config, str(tmp_path / "run")) as directory:
        (directory.path / "mine").mkdir()
        raise UsageError("no")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_run_that_was_killed_while_it_wrote_its_first_file_can_begin_again(tmp_path: Path, run_config: RunConfig) -> None:
    """There is no run.toml, so it cannot be resumed either."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run.toml.123.tmp").write_text("[sour")
    (run / "run.lock").touch()
    with RunDirectory.create(run_config, str(run)):
        assert [path.name for path in run.iterdir() if path.name != "run.lock"] == ["run.toml"]


@pytest.fixture
def run_config() -> RunConfig:
    return RunConfig.model_validate({"source": {"use": "text"}, "architecture": {"use": "topk"}})


# --- two processes -----------------------------------------------------------------------------------------------

HELD = """
    @hookimpl
    def step_ended(self, trainer):
        import pathlib, time
        until = time.monotonic() + 20
        while pathlib.Path({hold!r}).exists() and time.monotonic() < until:
            time.sleep(0.02)
"""


@pytest.fixture
def held(run_file: Files, plugin_file: Callable[[str, str], Path], tmp_path: Path) -> Iterator[tuple[Running, Path, list]]:
    """A process in the middle of training, which goes on once `hold` is gone; the run's directory; how it was called."""
    hold, run = tmp_path / "hold", tmp_path / "run"
    hold.touch()
    plugin = plugin_file("hold", listener_plugin("callback", "hold", HELD.format(hold=str(hold))))
    arguments = ["run", run_file(callback=[{"use": "hold"}]), "--plugin", plugin, "--directory", run]
    with running(*arguments) as process:
        deadline = time.monotonic() + 60
        while not (run / "provenance.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None
        yield process, run, arguments


def test_a_second_process_is_refused(held: tuple[Running, Path, list], command: Run, tmp_path: Path) -> None:
    process, run, arguments = held
    assert process.pid
    for second in (arguments, ["run", "--resume", run], ["report", run]):
        outcome = command(*second)
        assert outcome.code == 2
        outcome.says(str(run), f"process {process.pid} on ", "Wait until it has ended")
    (tmp_path / "hold").unlink()
    process.wait(60)
    assert process.returncode == 0, process.communicate()
    assert [line["step"] for line in logged(run)] == list(range(20))
    assert not (run / "run.lock").exists()


def test_a_killed_process_blocks_nobody(held: tuple[Running, Path, list], command: Run, tmp_path: Path) -> None:
    process, run, _ = held
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    (tmp_path / "hold").unlink()
    assert (run / "run.lock").exists()
    assert command("run", "--resume", run).code == 0
    assert [line["step"] for line in logged(run)] == list(range(20))
    assert not (run / "run.lock").exists()
