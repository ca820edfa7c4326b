"""TensorBoard and Weights & Biases, read back from their files: every logged step once, through a resume as well."""

from __future__ import annotations

import importlib.util
import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import STEPS, Outcome, logged, weights

from saekit.errors import UsageError
from saekit.plugins import Registry

BREAKS = """
from saekit import Component, hookimpl

class Breaks:
    @hookimpl
    def step_ended(self, number):
        if number == 12:
            raise RuntimeError("pulled the plug")

@hookimpl
def saekit_callbacks():
    yield Component("breaks", Breaks, "Stops the run in its thirteenth step.")
"""


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """The series of a run by name, as TensorBoard itself reads them: purged steps are gone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    series = {}
    for name in accumulator.Tags()["scalars"]:
        events = accumulator.Scalars(name)
        assert len({event.step for event in events}) == len(events), f"{name} has a step twice"
        series[name] = {event.step: event.value for event in events}
    return series


def records(run: Path) -> list[Any]:
    """The records in the .wandb files of a run, oldest file first. wandb's own process writes them, and may still be
    about it when `finish` has returned: the record of the exit comes last."""
    found = []
    for directory in sorted((run / "wandb").glob("offline-run-*")):  # named by the time
        (path,) = directory.glob("*.wandb")
        deadline = time.monotonic() + 30
        read = list(records_in(path))
        while not any(record.HasField("exit") for record in read):
            assert time.monotonic() < deadline, f"{path} has no record of the exit"
            time.sleep(0.05)
            read = list(records_in(path))
        found += read
    return found


def records_in(path: Path) -> Iterator[Any]:
    """A LevelDB log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # the rest of a block is filled up
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if not kind:
            break
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def history(run: Path) -> list[dict[str, Any]]:
    """What `log` was called with, in order."""
    lines = []
    for record in records(run):
        if record.HasField("history"):
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines


def summary(run: Path) -> dict[str, Any]:
    """What the summary was told."""
    told = {}
    for record in records(run):
        for item in record.summary.update:
            told[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return told


def ids(run: Path) -> set[str]:
    return {record.run.run_id for record in records(run) if record.HasField("run")}


@pytest.fixture
def interrupted(run_file, command, tmp_path: Path, plugin_file) -> Callable[[str], Path]:
    """A run with one tracker that failed in its thirteenth step, after the checkpoint at ten, and was resumed."""

    def make(tracker: str) -> Path:
        run = tmp_path / "run"
        breaks = plugin_file("breaks", BREAKS)
        first = command(
            "run", run_file(tracker=[{"use": tracker}]), "--directory", run, "--plugin", breaks, "--callback", "breaks"
        )
        assert first.code == 3
        first.says("pulled the plug")
        breaks.write_text(BREAKS.replace("number == 12", "number == -1"))
        second: Outcome = command("run", "--resume", run)
        assert second.code == 0, second.err
        return run

    return make


@pytest.mark.slow
def test_tensorboard_has_every_step_once(run_file, command, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    assert command("run", run_file(tracker=[{"use": "tensorboard"}]), "--directory", run, "--analyze", "features").code == 0
    series = scalars(run)
    lines = logged(run)
    assert list(series["loss/mse"]) == list(range(STEPS))
    for name in ("loss", "loss/mse", "explained_variance", "l0"):
        assert list(series[name].values()) == pytest.approx([line[name] for line in lines], rel=1e-6)
    done = json.loads((run / "summary.json").read_text())
    for name, value in done["metrics"].items():
        if value is not None:
            assert series[f"held_out/{name}"] == {STEPS - 1: pytest.approx(value, rel=1e-6)}
    assert set(series) >= {f"analysis/features/{name}" for name, value in done["analysis"]["features"].items() if value is not None}
    assert not done["warnings"]


@pytest.mark.slow
def test_tensorboard_goes_on_where_the_checkpoint_was(interrupted) -> None:
    pytest.importorskip("tensorboard")
    run = interrupted("tensorboard")
    series = scalars(run)["loss"]
    assert list(series) == list(range(STEPS))
    assert list(series.values()) == pytest.approx([line["loss"] for line in logged(run)], rel=1e-6)


@pytest.mark.slow
def test_wandb_offline(run_file, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "run"
    outcome = command("run", run_file(tracker=[{"use": "wandb", "project": "mine"}]), "--directory", run, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["warnings"] == []
    lines, there = logged(run), history(run)
    assert [line["step"] for line in there] == list(range(STEPS))
    assert [line["loss"] for line in there] == pytest.approx([line["loss"] for line in lines])
    told = summary(run)
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    assert {f"held_out/{name}" for name, value in metrics.items() if value is not None} <= told.keys()
    assert told["held_out/l0"] == pytest.approx(metrics["l0"])
    (begun,) = [record.run for record in records(run) if record.HasField("run")][:1]
    assert (begun.project, begun.display_name) == ("mine", "run")
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["architecture"]["k"] == 4


@pytest.mark.slow
def test_wandb_goes_on_under_the_same_id(interrupted) -> None:
    pytest.importorskip("wandb")
    run = interrupted("wandb")
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    assert len(ids(run)) == 1
    steps = [line["step"] for line in history(run)]
    assert steps == [*range(12), *range(10, STEPS)]  # the two that the checkpoint had not seen come again


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_fails_only_warns(tracker: str, run_file, command, tmp_path: Path) -> None:
    """Its place is taken by a file; the run ends with the weights of one without it."""
    pytest.importorskip(tracker)
    run, other = tmp_path / "run", tmp_path / "other"
    taken = tmp_path / "taken.py"
    taken.write_text(
        "from saekit import Component, hookimpl\n"
        "class Taken:\n"
        "    @hookimpl\n"
        "    def run_started(self, run):\n"
        f"        (run.directory.path / {tracker!r}).write_text('')\n"
        "@hookimpl\n"
        "def saekit_callbacks():\n"
        "    yield Component('taken', Taken, 'In the way.')\n"
    )
    file = run_file(tracker=[{"use": tracker}])
    assert command("run", file, "--directory", run, "--plugin", taken, "--callback", "taken").code == 0
    (warning,) = json.loads((run / "summary.json").read_text())["warnings"]
    assert f"tracker '{tracker}'" in warning and "It is dropped and the run goes on." in warning
    assert command("run", run_file(), "--directory", other).code == 0
    assert weights(run) == weights(other)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_anything_begins(
    tracker: str, run_file, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == tracker else find(name, *rest))
    with pytest.raises(UsageError, match=rf'pip install "saekit\[{tracker}\]"'):
        Registry().find("tracker", tracker).build({})
    outcome = command("run", run_file(tracker=[{"use": tracker}]), "--directory", tmp_path / "run")
    assert outcome.code == 2
    outcome.says(f'pip install "saekit[{tracker}]"')
    assert not (tmp_path / "run").exists()
