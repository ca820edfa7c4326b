"""What listeners are given: the same things under the same names and numbers in every hook, typed as the contract says."""

from __future__ import annotations

import inspect
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

import saekit
from saekit import Registry, RunInfo, hookspecs
from saekit.activations.shuffle import stop_point
from saekit.builtin.sources import SyntheticSource
from saekit.component import Component
from saekit.hookspecs import Declaring, Lifecycle, hookimpl
from saekit.terminal.lines import LinesView
from saekit.terminal.view import LiveView
from saekit.testing import registry_of, tiny_run
from saekit.testing.tiny import carried_out, tiny_table

LISTENERS = [
    *(c.load() for kind in ("callback", "tracker") for c in Registry().components(kind) if c.distribution.startswith("saekit")),
    LinesView,
    LiveView,
]
TYPED = {"run": "RunInfo", "trainer": "Training", "result": "Result"}


def hooks_of(family: type) -> dict[str, Any]:
    return {name: hook for name, hook in vars(family).items() if not name.startswith("_")}


def test_hooks_hand_over_what_has_a_type() -> None:
    for name, hook in hooks_of(Lifecycle).items():
        for argument, parameter in inspect.signature(hook).parameters.items():
            assert TYPED.get(argument, "") in str(parameter.annotation), (name, argument)
            assert str(parameter.annotation) != "Any", (name, argument)


@pytest.mark.parametrize("listener", LISTENERS, ids=lambda listener: listener.__name__)
def test_first_party_listeners_take_what_the_contract_says(listener: type) -> None:
    found = {name: getattr(listener, name) for name in hooks_of(Lifecycle) if hasattr(listener, name)}
    assert found
    for name, method in found.items():
        told = inspect.signature(getattr(Lifecycle, name)).parameters
        for argument, parameter in inspect.signature(method).parameters.items():
            if argument != "self":
                given = str(parameter.annotation).removeprefix("protocols.")
                assert given == told[argument].annotation, f"{name}({argument}: {given})"


def test_the_plugin_that_the_contract_opens_with_works(tmp_path: Path) -> None:
    assert hookspecs.__doc__ is not None
    code = textwrap.dedent(hookspecs.__doc__.partition(":\n\n")[2].partition("\n\n`saekit run")[0])
    (tmp_path / "sparse.py").write_text(code, encoding="utf-8")
    run = tiny_run(
        tmp_path / "run",
        registry=Registry(files=[str(tmp_path / "sparse.py")]),
        loss=[{"use": "mse"}, {"use": "sparse", "weight": 0.01}],
    )
    assert run.summary["losses"]["sparse"] > 0
    assert set(hooks_of(Declaring)) >= {"saekit_losses"}


class Recorder:
    """Writes down the number of every hook that has one, and every `run`."""

    def __init__(self) -> None:
        self.numbers: list[tuple[str, int, int]] = []
        self.paths: dict[int, str] = {}
        self.runs: list[Any] = []

    @hookimpl
    def run_started(self, run: RunInfo) -> None:
        self.runs.append(run)

    @hookimpl
    def step_started(self, trainer: Any, number: int) -> None:
        self.numbers.append(("step_started", number, trainer.number))

    @hookimpl
    def gradients_ready(self, trainer: Any, number: int) -> None:
        self.numbers.append(("gradients_ready", number, trainer.number))

    @hookimpl
    def step_ended(self, trainer: Any, number: int) -> None:
        self.numbers.append(("step_ended", number, trainer.number))

    @hookimpl
    def logged(self, trainer: Any, number: int) -> None:
        self.numbers.append(("logged", number, trainer.number))

    @hookimpl
    def checkpoint_saved(self, trainer: Any, number: int, path: Path) -> None:
        self.numbers.append(("checkpoint_saved", number, trainer.number))
        self.paths[number] = path.name

    @hookimpl
    def run_finished(self, run: RunInfo) -> None:
        self.runs.append(run)


def recorded(place: Path, **sections: Any) -> list[Recorder]:
    """The recorders of a tiny run: one for each SAE, and last that of the view."""
    made: list[Recorder] = []

    class Own(Recorder):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    registry = registry_of(callback=Component("recorder", Own, "Writes down."))
    view = Recorder()
    carried_out({**tiny_table(), "callback": [{"use": "recorder"}], **sections}, place, registry, view)
    assert made
    return [*made, view]


def test_a_step_has_one_number_in_every_hook(tmp_path: Path) -> None:
    for recorder in recorded(tmp_path / "run"):
        within = {"step_started": 0, "gradients_ready": 0, "step_ended": 1, "logged": 1, "checkpoint_saved": 1}
        seen: dict[int, list[str]] = {}
        for hook, number, done in recorder.numbers:
            assert done == number + within[hook], hook
            seen.setdefault(number, []).append(hook)
        assert list(seen) == list(range(12))
        for number, hooks in seen.items():
            saved = ["checkpoint_saved"] if number in (4, 9, 11) else []
            assert hooks == ["step_started", "gradients_ready", "step_ended", "logged", *saved]
        assert recorder.paths == {number: f"step-{number + 1:08d}" for number in (9, 11)} | {4: "step-00000005"}


def test_the_view_and_the_listeners_of_each_variant_are_told_the_same_kind_of_run(tmp_path: Path) -> None:
    place = tmp_path / "run"
    variants = [{"name": "a"}, {"name": "b", "training": {"lr": 1e-4}}]
    *own, view = recorded(place, variant=variants)
    assert [recorder.runs[0].variant for recorder in own] == ["a", "b"]
    for recorder in (*own, view):
        first, last = recorder.runs
        assert first is last and isinstance(first, saekit.RunInfo)
        assert first.plan is view.runs[0].plan and len(first.plan.members) == 2
    assert view.runs[0].variant == "" and view.runs[0].directory.path == place
    assert own[1].runs[0].directory.path == place / "variants" / "b"
    assert own[1].runs[0].config.training.lr == 1e-4
    assert view.runs[0].config.training.lr == 1e-3


class SlowSource(SyntheticSource):
    """Its second training block takes longer than a second, and says how far it has come."""

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Any:
        for number, block in enumerate(super().blocks(split, size=size, seed=seed, start=start), start):
            for done in range(60, 160, 10) if split == "train" and number == 1 else ():
                stop_point(done, 200)
                time.sleep(0.15)
            yield block


@pytest.mark.parametrize("prefetch", [0, 1])
def test_listeners_hear_how_far_the_harvest_of_a_block_has_come(prefetch: int, tmp_path: Path) -> None:
    heard: dict[str, list[tuple[int, int]]] = {"callback": [], "view": []}

    class Hears:
        kind = "callback"

        @hookimpl
        def harvest_advanced(self, done: int, total: int) -> None:
            heard[self.kind].append((done, total))

    class View(Hears):
        kind = "view"

    registry = registry_of(source=Component("slow", SlowSource), callback=Component("hears", Hears))
    table = tiny_table()
    table |= {"source": {**table["source"], "use": "slow"}, "callback": [{"use": "hears"}]}
    table["training"] |= {"prefetch": prefetch, "buffer": 1024, "tokens": 40 * 32}  # two blocks
    carried_out(table, tmp_path / "run", registry, View())
    assert heard["view"] == heard["callback"]
    assert heard["view"]
    assert all(60 <= done < 160 and total == 200 for done, total in heard["view"])
