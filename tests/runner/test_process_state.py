"""A component that changes what the whole process shares changes nothing for the others, and is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Outcome, weights

from saekit import Component, Result, hookimpl
from saekit.errors import PluginError
from saekit.process_state import kept
from saekit.testing import registry_of, tiny_run

CHANGES: dict[str, Callable[[Path], Any]] = {
    "whether gradients are computed": lambda place: torch.set_grad_enabled(False),
    "torch's default dtype": lambda place: torch.set_default_dtype(torch.float64),
    "torch's default device": lambda place: torch.set_default_device("meta"),
    "torch's deterministic mode": lambda place: torch.use_deterministic_algorithms(True),
    "torch's precision of matrix products": lambda place: torch.set_float32_matmul_precision("medium"),
    "torch's number of threads": lambda place: torch.set_num_threads(torch.get_num_threads() + 1),
    "the working directory": lambda place: os.chdir(place),
}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Whatever goes wrong, the tests that follow find the process as it was."""
    with kept("a test", lambda message: None):
        yield


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_is_put_back_and_told(what: str, tmp_path: Path) -> None:
    told: list[str] = []
    with kept("outer", told.append):
        with kept("callback 'x'", told.append):
            CHANGES[what](tmp_path)
        assert len(told) == 1
    assert told[0].startswith(f"callback 'x' changed {what} from ")
    assert len(told) == 1


def go_away(place: Path) -> None:
    with kept("x", print):
        os.chdir(place)
        (place / "gone").rmdir()


def test_what_cannot_be_put_back_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    home = Path.cwd()
    os.chdir(tmp_path / "gone")
    try:
        with pytest.raises(PluginError, match="working directory .* cannot be put back"):
            go_away(tmp_path)
    finally:
        os.chdir(home)


class Changes:
    """A callback that changes everything in the hook that it is told."""

    def __init__(self, *, place: str, hook: str) -> None:
        self.place, self.hook = Path(place), hook

    def change(self, hook: str) -> None:
        if hook == self.hook:
            for name, change in CHANGES.items():
                if self.hook == "logged" or name in list(CHANGES)[:2] or name == "the working directory":
                    change(self.place)

    @hookimpl
    def step_started(self) -> None:
        self.change("step_started")

    @hookimpl
    def logged(self) -> None:
        self.change("logged")


@pytest.mark.parametrize("hook", ["step_started", "logged"])
def test_a_callback_changes_nothing_for_the_training(hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    registry = registry_of(callback=Component("changes", Changes))
    undisturbed = tiny_run(Path("undisturbed"), registry=registry)
    entry = {"use": "changes", "hook": hook, "place": str(tmp_path / "undisturbed")}
    disturbed = tiny_run(Path("disturbed"), registry=registry, callback=[entry])
    assert weights(tmp_path / "disturbed") == weights(tmp_path / "undisturbed")
    assert disturbed.summary["metrics"] == undisturbed.summary["metrics"]
    told = "\n".join(disturbed.summary["warnings"])
    assert "callback 'changes'" in told
    assert "whether gradients are computed from True to False" in told
    assert "the working directory from" in told


def test_gradients_are_on_whoever_calls_the_run(tmp_path: Path) -> None:
    tiny_run(tmp_path / "with")
    with torch.no_grad():
        tiny_run(tmp_path / "without")
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


def test_a_loss_and_an_analyzer_are_named_too(tmp_path: Path) -> None:
    def loss(step: Any) -> Any:
        torch.set_default_dtype(torch.float64)
        return step.code.sum().mean()

    def analyzer(context: Any) -> Result:
        torch.set_default_device("meta")
        return Result()

    registry = registry_of(loss=Component("doubles", loss), analyzer=Component("moves", analyzer))
    uses = {"loss": [{"use": "mse"}, {"use": "doubles", "weight": 1e-3}], "analyzer": [{"use": "moves"}]}
    told = tiny_run(tmp_path / "run", registry=registry, **uses).summary["warnings"]
    assert any("loss 'doubles'" in message and "default dtype" in message for message in told)
    assert any("analyzer 'moves'" in message and "default device" in message for message in told)


def test_a_plugin_that_is_not_used_changes_no_weights(
    run_file: Callable[..., Path], plugin_file: Callable[[str, str], Path], command: Callable[..., Outcome], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    code = f"import os, torch\ntorch.set_default_dtype(torch.float64)\nos.chdir({str(tmp_path / 'elsewhere')!r})\n"
    meddler = plugin_file("meddler", code)
    assert command("run", run_file(), "--directory", "plain").code == 0
    outcome = command("run", run_file(), "--plugin", meddler, "--directory", "meddled")
    assert outcome.code == 0, outcome.err
    outcome.says("plugin 'meddler'", "torch's default dtype from torch.float32 to torch.float64", "the working directory")
    assert weights(tmp_path / "plain") == weights(tmp_path / "meddled")


LEAVES = """
import sys
from typing import Annotated
from pydantic import AfterValidator
from saekit import Component, hookimpl
from saekit.builtin.architectures.topk import TopK

class Leaves(TopK):
    @classmethod
    def check(cls, options, *, transcoder):
        sys.exit(0)

def validated(step, *, power: Annotated[float, AfterValidator(lambda value: sys.exit(0))] = 1.0):
    return step.code.sum().mean()

@hookimpl
def saekit_architectures():
    yield Component("leaves", Leaves)

@hookimpl
def saekit_losses():
    yield Component("validated", validated)
"""


@pytest.mark.parametrize("use", [["--architecture", "leaves:k=4"], ["--loss", "validated:power=2"]])
def test_sys_exit_in_a_plan_is_a_failure(
    use: list[str], run_file: Callable[..., Path], plugin_file: Callable[[str, str], Path], command: Callable[..., Outcome]
) -> None:
    outcome = command("run", run_file(), "--plugin", plugin_file("leaver", LEAVES), "--dry-run", *use)
    assert outcome.code == 3, outcome.err
    outcome.says("'leaver'", "SystemExit: 0")
