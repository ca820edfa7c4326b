# ruff: noqa: PT012 - an error that leaves the `with` block of a whole program is what these tests are about
"""`saekit.Online`: what a program pushes is trained on as any run trains, beside the program and without touching it."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import WEIGHTS, logged
from safetensors.torch import load_file, save_file
from torch import nn

import saekit
from saekit.api import resume
from saekit.errors import PluginError, RunError, UsageError

D, N, BATCH = 8, 96, 16
STEPS = 24


def run_file(**changes: Any) -> dict[str, Any]:
    """A run of 24 steps on a buffer of 96 rows. A change's key has `__` between its parts."""
    table: dict[str, Any] = {
        "source": {"use": "pushed", "d_in": D, "rows": N, "held_out": 0.5},
        "architecture": {"use": "topk", "d_sae": 24, "k": 3},
        "loss": [{"use": "mse"}, {"use": "auxk", "weight": 0.1}],
        "training": {
            "tokens": STEPS * BATCH, "batch_size": BATCH, "buffer": N, "log_every": 1, "checkpoint_every": 7, "device": "cpu",
            "lr": {"schedule": "warmup_decay", "to": 3e-3, "warmup": 5}, "dead_after": 64,
        },
        "evaluation": {"tokens": 48},
    }  # fmt: skip
    for key, value in changes.items():
        *parents, last = key.split("__")
        target = table
        for parent in parents:
            target = target[parent]
        target[last] = copy.deepcopy(value)
    return table


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / WEIGHTS)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pushes(start: int = 0) -> Iterator[torch.Tensor]:
    """What a program pushes in its step `start`, `start + 1`, ..."""
    number = start
    while True:
        yield rows(32, seed=100 + number)
        number += 1


def feed(online: saekit.Online, start: int = 0) -> None:
    """Push and step until the SAE has had all of its steps."""
    for x in pushes(start):
        online.push(x)
        online.step()
        if online.done:
            return


# --- the same as any run -----------------------------------------------------------------------------------------


def test_a_full_buffer_that_stands_still_trains_to_the_bits_of_the_same_vectors_in_a_file(tmp_path: Path) -> None:
    """The setting in which the orders agree: one chunk, one shuffle block and the buffer are all of the training vectors."""
    x = rows(2 * N)
    save_file({"activations": x}, tmp_path / "x.safetensors")
    stored = {"use": "tensors", "data": str(tmp_path / "x.safetensors"), "chunk": N, "held_out": 0.5}
    # resample: a callback that draws random numbers, and looks at what it is trained on
    callback = [{"use": "resample", "every": 5, "below": 0.05}]
    of_file = saekit.run(run_file(source=stored) | {"callback": callback}, directory=tmp_path / "file")
    with saekit.Online(run_file() | {"callback": callback}, directory=tmp_path / "pushed") as online:
        train, held_out = x[:N], x[N : N + 48]  # of two chunks, `tensors` holds out the second; 48 rows of it are measured
        online.push(held_out, held_out=True)
        online.push(train[:40], held_out=False)
        online.push(train[40:], held_out=False)
        while not online.done:
            assert online.step()
    assert online.finished is not None
    assert same(weights(of_file.directory), weights(online.directory))
    assert online.finished.summary["metrics"] == pytest.approx(of_file.summary["metrics"], rel=1e-5)  # added in another order
    keys = {"tokens_per_second", "seconds"}
    for one, other in zip(logged(of_file.directory), logged(online.directory), strict=True):
        assert {k: v for k, v in one.items() if k not in keys} == {k: v for k, v in other.items() if k not in keys}
    assert {path.name for path in of_file.directory.iterdir()} == {path.name for path in online.directory.iterdir()}
    assert of_file.summary.keys() == online.finished.summary.keys()


def test_the_file_comparison_can_fail(tmp_path: Path) -> None:
    """With a buffer that moves on while the SAE is trained, the draws are others."""
    found = []
    for moving in (False, True):
        with saekit.Online(run_file(), directory=tmp_path / str(moving)) as online:
            online.push(rows(N), held_out=True)
            online.push(rows(N, seed=1), held_out=False)
            while not online.done:
                online.step()
                if moving:
                    online.push(rows(4, seed=2), held_out=False)
        found.append(weights(online.directory))
    assert not same(*found)


def test_variants_train_beside_one_another_to_the_bits_that_each_reaches_alone(tmp_path: Path) -> None:
    table = run_file() | {"variant": [{"name": "narrow"}, {"name": "wide", "architecture": {"d_sae": 40}}]}
    with saekit.Online(table, directory=tmp_path / "both") as online:
        feed(online)
    for name, d_sae in (("narrow", 24), ("wide", 40)):
        with saekit.Online(run_file(architecture__d_sae=d_sae), directory=tmp_path / name) as alone:
            feed(alone)
        assert same(weights(alone.directory), weights(online.directory / "variants" / name))


def test_steps_come_every_so_often_once_the_buffer_is_filled(tmp_path: Path) -> None:
    with saekit.Online(run_file(source__every=3, source__fill=90), directory=tmp_path / "run") as online:
        took = []
        for number, x in zip(range(80), pushes(), strict=False):
            online.push(x, held_out=number == 0)
            took.append(online.step())
        assert [i + 1 for i, one in enumerate(took) if one] == [6 + 3 * n for n in range(STEPS)]  # three pushes hold 96 rows
        assert online.done and online.steps == STEPS
        assert {"mse", "loss"} <= online.losses.keys()


def test_a_program_that_ends_early_leaves_a_finished_run_that_says_so(tmp_path: Path) -> None:
    with saekit.Online(run_file(), directory=tmp_path / "run") as online:
        for _, x in zip(range(12), pushes(), strict=False):
            online.push(x)
            online.step()
    assert online.finished is not None and online.steps < STEPS
    summary = online.finished.summary
    assert (summary["steps"], summary["tokens"]) == (online.steps, online.steps * BATCH)
    assert any(f"ended after {online.steps} of {STEPS} steps" in warning for warning in summary["warnings"])


def test_the_time_of_the_program_counts_as_waiting(tmp_path: Path) -> None:
    with saekit.Online(run_file(), directory=tmp_path / "run") as online:
        online.push(rows(N))
        online.push(rows(N), held_out=True)
        time.sleep(0.2)
        while not online.done:
            online.step()
            time.sleep(0.01)
    assert online.finished is not None
    assert online.finished.summary["seconds"]["harvest"] >= 0.2 + 0.01 * (STEPS - 1)


# --- beside the program ------------------------------------------------------------------------------------------


class Primary(nn.Module):
    """A model with dropout, whose training draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Dropout(0.3), nn.Linear(D, D))
        self.head = nn.Linear(D, 1)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.encoder(x))


def trained_primary(online: saekit.Online | None, steps: int = 30) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Primary()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(steps):
        x = torch.randn(32, D)
        hidden = model.encoder(x)
        loss = (model.head(hidden).squeeze(1) - x.sum(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if online is not None:
            online.push(hidden)  # with its graph, as it comes
            online.step()
    return model.state_dict()


def test_the_program_trains_as_it_would_alone(tmp_path: Path) -> None:
    """Its random numbers, its gradients and its modes are not touched, whatever the SAE's run draws."""
    alone = trained_primary(None)
    table = run_file() | {"callback": [{"use": "resample", "every": 5, "below": 0.05}]}
    torch.manual_seed(7)
    with saekit.Online(table, directory=tmp_path / "run") as online:
        beside = trained_primary(online)
        drawn = torch.rand(4)
    assert same(alone, beside)
    assert online.steps == STEPS
    trained_primary(None)
    assert torch.equal(drawn, torch.rand(4))


MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "bf16": lambda: torch.autocast("cpu", torch.bfloat16)}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_whatever_mode_the_program_is_in_the_sae_trains_to_the_same_bits(mode: Any, tmp_path: Path) -> None:
    with saekit.Online(run_file(), directory=tmp_path / "plain") as plain:
        feed(plain)
    with mode(), saekit.Online(run_file(), directory=tmp_path / "mode") as online:
        feed(online)
    assert same(weights(plain.directory), weights(online.directory))


def test_any_float_type_is_taken_and_copied(tmp_path: Path) -> None:
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with saekit.Online(run_file(), directory=tmp_path / str(dtype)) as online:
            x = rows(N, seed=3).bfloat16().to(dtype)
            online.push(x, held_out=False)
            online.push(x, held_out=True)
            x.zero_()
            while not online.done:
                online.step()
        found.append(weights(online.directory))
    assert same(found[0], found[1]) and same(found[0], found[2])


# --- watch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["none", "mean", "max", "first", "last"])
def test_watching_a_module_pushes_what_its_forward_has_there(pool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Primary().eval()
    x, mask = torch.randn(5, 4, D), torch.rand(5, 4) < 0.6
    mask[0], mask[1] = True, False  # one row is all padding
    pushed: list[torch.Tensor] = []
    with pytest.raises(KeyboardInterrupt), saekit.Online(run_file(), directory=tmp_path / "run") as online:
        monkeypatch.setattr(online, "push", lambda rows: pushed.append(rows))
        with online.watch(model, "encoder", pool=pool, mask="attention_mask"):
            model(x, attention_mask=mask)
            model(x, mask)
        model(x, mask)
        raise KeyboardInterrupt
    hidden = model.encoder(x)
    by_row = [hidden[i][mask[i]] for i in range(5) if mask[i].any()]  # each [kept, d]
    expected = {
        "none": torch.cat(by_row),
        "mean": torch.stack([row.mean(0) for row in by_row]),
        "max": torch.stack([row.amax(0) for row in by_row]),
        "first": torch.stack([row[0] for row in by_row]),
        "last": torch.stack([row[-1] for row in by_row]),
    }[pool]
    assert len(pushed) == 2
    for rows in pushed:
        torch.testing.assert_close(rows, expected)
        assert not rows.requires_grad


def test_watching_may_leave_out_forwards_that_only_measure(tmp_path: Path) -> None:
    model = Primary()
    table = run_file(source__hook_point="encoder")
    with saekit.Online(table, directory=tmp_path / "run") as online, online.watch(model, only_in_training=True):
        for _ in range(40):
            model.eval()(torch.full((32, D), torch.nan))
            model.train()(torch.randn(32, D))
            online.step()
    assert online.finished is not None and not any("finite" in w for w in online.finished.summary["warnings"])
    assert online.finished.summary["hook_point"] == "encoder"


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.fixture
def online(tmp_path: Path) -> Iterator[saekit.Online]:
    with saekit.Online(run_file(), directory=tmp_path / "run") as online:
        yield online
        feed(online)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(4, D + 1), "source.d_in"),
        (torch.zeros(4, 2, D), "x[mask]"),
        (torch.zeros(D), "[n, 8]"),
        (torch.zeros(4, D, dtype=torch.long), ".float()"),
        (torch.zeros(4, D, dtype=torch.complex64), ".float()"),
        ([[0.0] * D], "list"),
    ],
)
def test_what_cannot_be_pushed_is_refused_and_the_run_goes_on(online: saekit.Online, x: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        online.push(x)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_rows_that_are_not_finite_are_left_out_with_a_word(tmp_path: Path) -> None:
    found = []
    for spoilt in (False, True):
        with saekit.Online(run_file(), directory=tmp_path / str(spoilt)) as online:
            for number, x in zip(range(40), pushes(), strict=False):
                if spoilt:
                    bad = torch.full((2, D), torch.nan)
                    bad[1] = torch.inf
                    x = torch.cat([x[:5], bad, x[5:]])
                online.push(x, held_out=number % 4 == 1)
                online.step()
        assert online.finished is not None
        assert any("80 of the activations" in w for w in online.finished.summary["warnings"]) == spoilt
        found.append(weights(online.directory))
    assert same(*found)


def test_nothing_happens_after_the_end(tmp_path: Path) -> None:
    with saekit.Online(run_file(), directory=tmp_path / "run") as online:
        with pytest.raises(UsageError, match="not begun"):
            saekit.Online(run_file()).push(rows(4))
        feed(online)
        before = online.finish()
    assert online.finished is before
    calls = [lambda: online.push(rows(4)), online.step, online.finish, online.save, lambda: online.watch(Primary()).__enter__()]
    for call in calls:
        with pytest.raises(UsageError, match="has ended"):
            call()
    with pytest.raises(UsageError, match="has begun already"), online:
        pass
    with pytest.raises(UsageError, match="has finished"):
        saekit.Online.resume(online.directory)


def test_a_run_that_was_given_too_little_says_how_much(tmp_path: Path) -> None:
    too_little = pytest.raises(RunError, match="nothing was trained: 9 activations are held")
    with too_little, saekit.Online(run_file(source__fill=4), directory=tmp_path / "run") as online:
        assert online.step() is False
        online.push(rows(9))
        assert online.step() is False  # enough to fill it, and less than a batch
    nothing_held_out = pytest.raises(RunError, match="the held-out split gave no activations")
    with nothing_held_out, saekit.Online(run_file(), directory=tmp_path / "no_held_out") as online:
        online.push(rows(N), held_out=False)
        while not online.done:
            online.step()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source__rows": 15}, "source.rows: a buffer of 15 rows cannot hold a batch of 16"),
        ({"source__fill": 97}, "source.fill: 97"),
        ({"source__d_in": 0}, "source.d_in"),
        ({"source__cache": "cache"}, "source.cache"),
        ({"source": {"use": "synthetic", "d_in": D, "n_features": 16}}, "source.use: 'synthetic'"),
        ({"training__tokens": 0, "architecture__from": "x"}, "training.tokens"),
        ({"training__threads": 2}, "training.threads"),
        ({"loss": [{"use": "mse", "weight": None}]}, "what.loss"),
    ],
)
def test_what_cannot_be_an_online_run_is_refused_before_it_begins(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        saekit.Online(run_file(**changes), directory=tmp_path / "run")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_only_a_program_can_feed_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="saekit.Online"):
        saekit.run(run_file(), directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    interrupted(tmp_path / "half")
    with pytest.raises(UsageError, match="saekit.Online"):
        resume(str(tmp_path / "half"))


def test_two_at_once_in_one_directory(online: saekit.Online) -> None:
    with pytest.raises(UsageError, match="(?s)not empty|in use|exists"), saekit.Online(run_file(), directory=online.directory):
        pass
    with pytest.raises(UsageError, match="is in use by"):
        saekit.Online.resume(online.directory)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"hook_point": "decoder"}, "decoder"), ({}, "hook_point"), ({"hook_point": "encoder", "mask": "mask"}, "attention_mask")],
)
def test_what_cannot_be_watched(online: saekit.Online, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says), online.watch(Primary(), **options):
        pass


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((3, D), {"pool": "mean"}, r"\[n, T, d\]"),
        ((3, D), {"pool": "sum"}, "sum"),
        ((3, 4, D), {"mask": lambda: torch.ones(3, 5)}, "mask: is"),
    ],
)
def test_what_does_not_fit_where_it_is_watched(online: saekit.Online, shape: Any, options: dict[str, Any], says: str) -> None:
    model = Primary()
    with pytest.raises(UsageError, match=says), online.watch(model, "encoder", **options):
        model(torch.randn(shape))


# --- going on ----------------------------------------------------------------------------------------------------


class Stop(Exception):
    """What the program raises in the middle."""


def interrupted(directory: Path, after: int = 10, **changes: Any) -> saekit.Online:
    """A run whose program fails after its step `after`."""
    with pytest.raises(Stop), saekit.Online(run_file(**changes), directory=directory) as online:
        for number, x in enumerate(pushes()):
            online.push(x)
            online.step()
            if number + 1 == after:
                raise Stop("out of data")
    return online


def newest(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    place = max((directory / "checkpoints").glob("step-*"))
    return load_file(place / "tensors.safetensors"), json.loads((place / "state.json").read_text())


def test_a_program_that_fails_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    half = interrupted(tmp_path / "run")
    assert half.finished is None and 0 < half.steps < STEPS
    _, state = newest(half.directory)
    assert state["step"] == half.steps
    assert not (half.directory / "run.lock").exists() and not (half.directory / "summary.json").exists()
    with saekit.Online.resume(half.directory) as online:
        assert online.steps == half.steps
        feed(online, start=10)
    assert online.finished is not None and online.finished.summary["steps"] == STEPS
    assert [line["step"] for line in logged(online.directory)] == list(range(STEPS))


def test_with_the_buffer_kept_a_resumed_run_ends_at_the_bits_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """If the program, too, goes on where it was. Interrupted while the buffer is not yet full, and long after."""
    for rows_held in (N, 640):
        changes = {"source__rows": rows_held, "source__keep": True, "source__fill": 48, "source__every": 2}
        place = tmp_path / str(rows_held)
        with saekit.Online(run_file(**changes), directory=place / "whole") as whole:
            feed(whole)
        interrupted(place / "half", after=13, **changes)
        with saekit.Online.resume(place / "half") as online:
            feed(online, start=13)
        assert same(weights(whole.directory), weights(online.directory))


def test_without_the_buffer_all_but_the_draws_goes_on(tmp_path: Path) -> None:
    """Weights, moments, counts and random numbers are those of the checkpoint; the first step waits for the buffer."""
    half = interrupted(tmp_path / "run", source__fill=80)
    before, values = newest(half.directory)
    assert not [name for name in before if name.startswith("source.")]
    with pytest.raises(Stop), saekit.Online.resume(half.directory) as online:
        waited = 0
        for x in pushes(10):
            online.push(x)
            if online.step():
                break
            waited += 1
        assert waited >= 2 and online.steps == half.steps + 1
        raise Stop
    (line,) = [line for line in logged(half.directory) if line["step"] == half.steps]
    lr = next(one["lr"] for one in uninterrupted(tmp_path) if one["step"] == half.steps)
    assert line["lr"] == lr and line["tokens"] == (half.steps + 1) * BATCH
    after, state = newest(half.directory)
    assert state["step"] == half.steps + 1 and state["trainer"]["scale"] == values["trainer"]["scale"]
    # one step from the same weights with the same moments: Adam moves none of them by more than a few learning rates
    for name in ("sae.W_enc", "sae.b_dec"):
        assert 0 < float((after[name] - before[name]).abs().max()) <= 10 * lr
    assert all(float(after[name]) == half.steps + 1 for name in after if name.endswith(".step") and "W_enc" in name)


def uninterrupted(tmp_path: Path) -> list[dict[str, Any]]:
    with saekit.Online(run_file(source__fill=80), directory=tmp_path / "whole") as whole:
        feed(whole)
    return logged(whole.directory)


def test_what_a_resume_takes_back_is_bit_for_bit_what_was_saved(tmp_path: Path) -> None:
    """Saved again after a resume that took no step, a checkpoint is the same."""
    half = interrupted(tmp_path / "run")
    before, values = newest(half.directory)
    with pytest.raises(Stop), saekit.Online.resume(half.directory) as online:
        for x in pushes(10):
            online.push(x)
            if online._begun.source.held >= N:
                break
        online._begun._start()
        online._begun._saved = -1
        online.save()
        raise Stop
    after, now = newest(half.directory)
    assert same(before, after)
    different = {"sha256", "trainer"}
    assert {k: v for k, v in values.items() if k not in different} == {k: v for k, v in now.items() if k not in different}
    assert values["trainer"] | {"source.pushes": 0} == now["trainer"] | {"source.pushes": 0}


def test_an_error_in_the_middle_of_a_step_saves_nothing_of_it(tmp_path: Path) -> None:
    plugin = tmp_path / "failing.py"
    plugin.write_text(
        "import saekit\n"
        "class Failing:\n"
        "    @saekit.hookimpl\n"
        "    def gradients_ready(self, trainer, number):\n"
        "        if number == 9:\n"
        "            raise ValueError('no')\n"
        "@saekit.hookimpl\n"
        "def saekit_callbacks():\n"
        "    yield saekit.Component('failing', Failing, 'Fails.')\n"
    )
    table = run_file() | {"callback": [{"use": "failing"}]}
    with pytest.raises(PluginError, match="failing"), saekit.Online(table, plugins=[plugin], directory=tmp_path / "run") as online:
        feed(online)
    assert newest(tmp_path / "run")[1]["step"] == 7


def test_the_program_fails_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(Stop), saekit.Online(run_file(), directory=tmp_path / "run"):
        raise Stop
    with saekit.Online.resume(tmp_path / "run") as online:
        feed(online)
    with saekit.Online(run_file(), directory=tmp_path / "whole") as whole:
        feed(whole)
    assert same(weights(whole.directory), weights(online.directory))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from runner_test_online import saekit, run_file, pushes

with saekit.Online(run_file(source__keep=True), directory=sys.argv[1]) as online:
    for number, x in enumerate(pushes()):
        online.push(x)
        online.step()
        if online.steps == 17:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_program_resumes_at_its_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "runner_test_online.py").write_text(Path(__file__).read_text())
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(tests=str(tmp_path)))
    place = tmp_path / "half"
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, script, place], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with saekit.Online.resume(place) as online:
        assert online.steps == 14  # checkpoints come every 7 steps
        # The program's step 15 was the 13th of the SAE; which it was is in the checkpoint.
        feed(online, start=newest(place)[1]["trainer"]["source.steps"])
    with saekit.Online(run_file(source__keep=True), directory=tmp_path / "whole") as whole:
        feed(whole)
    assert same(weights(whole.directory), weights(online.directory))
    assert [line["step"] for line in logged(place)] == list(range(STEPS))
