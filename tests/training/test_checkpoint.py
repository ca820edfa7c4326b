"""Checkpoints: whole or passed over, never misread; what they hold comes back to the bit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Outcome, leftovers, logged, weights

from saekit.errors import UsageError
from saekit.files import DiskFull
from saekit.training import checkpoint


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tied = torch.randn(3, 4, generator=generator)
    return {
        "float32": torch.randn(5, 7, generator=generator),
        "transposed": torch.randn(5, 7, generator=generator).t(),
        "float64": torch.tensor([math.inf, -math.inf, math.nan, -0.0, 5e-324], dtype=torch.float64),
        "bfloat16": torch.randn(4, generator=generator).bfloat16(),
        "int64": torch.tensor([2**62, -1]),
        "bool": torch.tensor([True, False]),
        "bytes": torch.get_rng_state(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "tied": tied,
        "tied_too": tied,
        "part_of_tied": tied[1:],
    }


def state() -> dict[str, Any]:
    return {"decisive": {}, "position": [3, 17], "best": math.inf, "text": "ünïcode", "nested": {"a": [1, 2.5, None, True]}}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and a.flatten().view(torch.uint8).equal(b.flatten().view(torch.uint8))


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 12, tensors(), state(), keep=2)
    loaded, plain = checkpoint.load(path)
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert same_bits(loaded[name], tensor), name
    assert plain["step"] == 12
    assert {key: plain[key] for key in state()} == state()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for number in (5, 10, 15, 20):
        checkpoint.save(tmp_path, number, tensors(), state(), keep=2)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-00000020", "step-00000015"]
    assert not leftovers(tmp_path)


def test_nothing_there_is_a_start_and_no_error(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path / "absent") == (None, {}, {}, [])


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.STATE])
@pytest.mark.parametrize("tenth", range(10))
def test_one_cut_short_is_passed_over_for_the_older(file: str, tenth: int, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, tensors(), state(), keep=2)
    newest = checkpoint.save(tmp_path, 10, tensors(), state(), keep=2)
    whole = (newest / file).read_bytes()
    (newest / file).write_bytes(whole[: len(whole) * tenth // 10])
    path, loaded, plain, warnings = checkpoint.newest_whole(tmp_path)
    assert path == tmp_path / "step-00000005"
    assert plain["step"] == 5
    assert same_bits(loaded["float32"], tensors()["float32"])
    (warning,) = warnings
    assert str(newest) in warning
    assert "cut short" in warning or "not a whole checkpoint" in warning


@pytest.mark.parametrize("harm", ["no tensors", "no state", "one bit", "a list", "no position of the checksum", "a file"])
def test_other_harm_is_noticed_too(harm: str, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 5, tensors(), state(), keep=2)
    if harm == "no tensors":
        (path / checkpoint.TENSORS).unlink()
    elif harm == "no state":
        (path / checkpoint.STATE).unlink()
    elif harm == "one bit":
        content = bytearray((path / checkpoint.TENSORS).read_bytes())
        content[-1] ^= 1
        (path / checkpoint.TENSORS).write_bytes(content)
    elif harm == "a list":
        (path / checkpoint.STATE).write_text("[1, 2]")
    elif harm == "no position of the checksum":
        kept = json.loads((path / checkpoint.STATE).read_text())
        del kept["sha256"]
        (path / checkpoint.STATE).write_text(json.dumps(kept))
    else:
        shutil.rmtree(path)
        path.write_text("not a directory")
    with pytest.raises(UsageError) as caught:
        checkpoint.newest_whole(tmp_path)
    assert str(path) in str(caught.value)
    assert "no checkpoint is whole" in str(caught.value)


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 5, tensors(), {**state(), "format": 99}, keep=2)
    with pytest.raises(UsageError, match=f"format 99.*reads {checkpoint.FORMAT}"):
        checkpoint.load(path)


def test_a_failed_write_leaves_the_older_one_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 5, tensors(), state(), keep=1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskFull, match="step-00000010.*the disk is full"):
        checkpoint.save(tmp_path, 10, tensors(), state(), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


# --- a whole run -------------------------------------------------------------------------------------------------

STATEFUL = """
import math
import torch
from saekit import Component, hookimpl

class Tied(torch.nn.Module):
    '''Parameters of every awkward kind: a scalar, two names for one, and state beside them.'''
    def __init__(self, *, start: float = 1.0):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor(start))
        self.one = torch.nn.Linear(32, 4, bias=False)
        self.two = torch.nn.Linear(32, 4, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("queue", torch.zeros(8, 4))
    def __call__(self, step):
        head = self.one(step.reconstruction) - self.two(step.target) * self.temperature
        self.queue = torch.cat([self.queue[1:], head[:1].detach()])
        return head.square().mean() + 0.1 * (self.queue.mean(0) * head).mean().square()

class Keeper:
    '''Keeps an infinity, a list and a tensor, and changes the weights by what it keeps.'''
    def __init__(self):
        self.best, self.seen, self.sum = math.inf, [], torch.zeros(())
    @hookimpl
    def step_ended(self, trainer, number):
        self.seen.append(number)
        self.sum = self.sum + trainer.losses["loss"].detach()
        noise = torch.randn(trainer.sae.b_enc.shape, generator=trainer.generator)
        with torch.no_grad():
            trainer.sae.b_enc.add_(noise * 1e-3 * self.sum * len(self.seen) * (1 if self.best == math.inf else 100))
    def state_dict(self):
        return {"best": self.best, "seen": self.seen, "sum": self.sum}
    def load_state_dict(self, state):
        self.best, self.seen, self.sum = state["best"], state["seen"], state["sum"]

@hookimpl
def saekit_losses():
    yield Component("tied", Tied)

@hookimpl
def saekit_callbacks():
    yield Component("keeper", Keeper)
"""


def back_to(run: Path, step: int) -> None:
    """Leave of a finished run what there was right after the checkpoint of `step`."""
    for path in checkpoint.found(run / "checkpoints"):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    assert checkpoint.found(run / "checkpoints")[0].name == f"step-{step:08d}"
    (run / "summary.json").unlink()
    (run / "report.html").unlink()
    shutil.rmtree(run / "sae")


@pytest.mark.parametrize("step", [5, 10, 15, 20])
def test_a_run_goes_on_to_the_same_bits_whatever_its_components_keep(
    step: int,
    command: Callable[..., Outcome],
    run_file: Callable[..., Path],
    plugin_file: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    arguments = ["--plugin", plugin_file("stateful", STATEFUL), "--loss", "tied:weight=0.5", "--callback", "keeper"]
    file = run_file(training__keep_checkpoints=9, loss=[{"use": "mse"}, {"use": "auxk"}], training__dead_after=128)
    run = tmp_path / "run"
    done = command("run", file, *arguments, "--directory", run)
    assert done.code == 0, done.err
    before, lines = weights(run), logged(run)
    back_to(run, step)
    resumed = command("run", "--resume", run)
    assert resumed.code == 0, resumed.err
    assert weights(run) == before
    volatile = ("seconds", "tokens_per_second")
    assert [{k: v for k, v in line.items() if k not in volatile} for line in logged(run)] == [
        {k: v for k, v in line.items() if k not in volatile} for line in lines
    ]


def test_state_that_a_checkpoint_cannot_hold_is_the_components_failure(
    command: Callable[..., Outcome], run_file: Callable[..., Path], plugin_file: Callable[[str, str], Path], tmp_path: Path
) -> None:
    plugin = plugin_file("stateful", STATEFUL.replace('"best": self.best', '"best": {1, 2}'))
    done = command("run", run_file(), "--plugin", plugin, "--callback", "keeper", "--directory", tmp_path / "run")
    assert done.code == 3
    done.says("listener.callback.keeper.best", "set", "state_dict")
    assert not leftovers(tmp_path)


def test_state_that_its_component_does_not_take_back_is_its_failure(
    command: Callable[..., Outcome], run_file: Callable[..., Path], plugin_file: Callable[[str, str], Path], tmp_path: Path
) -> None:
    plugin = plugin_file("stateful", STATEFUL)
    run = tmp_path / "run"
    file = run_file(training__keep_checkpoints=9)
    assert command("run", file, "--plugin", plugin, "--callback", "keeper", "--directory", run).code == 0
    back_to(run, 10)
    plugin.write_text(STATEFUL.replace('state["best"], state["seen"]', 'state["worst"], state["seen"]'))
    done = command("run", "--resume", run)
    assert done.code == 3
    done.says("callback.keeper", "cannot take back", "'worst'", "changed")


def test_the_newest_damaged_in_a_run_gives_a_warning_and_the_same_weights(
    command: Callable[..., Outcome], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert command("run", run_file(), "--directory", run).code == 0
    before = weights(run)
    newest = checkpoint.found(run / "checkpoints")[0]
    content = (newest / checkpoint.TENSORS).read_bytes()
    (newest / checkpoint.TENSORS).write_bytes(content[: len(content) // 2])
    (run / "summary.json").unlink()
    done = command("run", "--resume", run, "--json")
    assert done.code == 0
    done.says(str(newest), "cut short", "An older checkpoint is used")
    assert any("cut short" in warning for warning in json.loads(done.out)["warnings"])
    assert weights(run) == before
    assert [line["step"] for line in logged(run)] == list(range(20))
