"""Plain lines: what a log must hold, and what it must not."""

from __future__ import annotations

import io
import itertools
from types import SimpleNamespace

import pytest

from saekit.terminal.lines import LinesView


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def view(script, out):
    return script.watch(LinesView(out, clock=script.clock))


def lines(out: io.StringIO, start: str) -> list[str]:
    return [line for line in out.getvalue().splitlines() if line.startswith(start)]


def test_a_whole_run(script, view, out, capsys):
    script.begin()
    script.train()
    script.finish()
    text = out.getvalue()
    for phase in ("prepare", "train", "evaluate", "analyse", "report"):
        assert f"{phase}: started" in text and f"{phase}: done in" in text
    assert "held out: explained variance 0.9134" in text and "probe score not defined" in text
    assert "analysed steer: shift not defined, strength 15" in text
    assert "report.html" in text
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_training_lines_name_everything_that_was_logged(script, view, out):
    script.begin()
    script.train(stop=200)
    line = lines(out, "train: step")[-1]
    for part in (
        "step 200/400",
        "50 %",
        "loss 0.6000",
        "mse 0.5000",
        "hoyer 26.25",
        "L0 32",
        "explained variance 0.5000",
    ):
        assert part in line
    for part in ("dead latents 41", "gate temperature 1.750", "16.4k tokens/s", "lr 0.001", "20 s left"):
        assert part in line


def test_variants_speak_of_the_same_steps(script, view, out):
    script.begin()
    trainers = [SimpleNamespace(variant=name, total_steps=400, sae=SimpleNamespace(d_sae=64)) for name in ("one", "two")]
    for step in range(9, 400, 10):
        script.now += 0.1
        for trainer in trainers:
            script.listeners.emit("logged", trainer=trainer, number=step, values=script.values(step))
    said = {name: [line.split(",")[0].split()[-1] for line in lines(out, f"train {name}: step")] for name in ("one", "two")}
    assert said["one"] == said["two"]
    assert len(said["one"]) == 10 and said["one"][-1] == "400/400"


def test_a_short_run_speaks_ten_times(script, view, out):
    script.begin()
    script.train(seconds=0.001)
    assert len(lines(out, "train: step")) == 10
    assert "step 400/400, 100 %" in lines(out, "train: step")[-1]


def test_a_long_phase_speaks_less_and_less_often(script, view, out):
    view.phase_started("harvest", 1_000_000)
    times = []
    for second in range(3600):
        script.now += 1
        before = out.tell()
        view.phase_advanced("harvest", second)
        if out.tell() > before:
            times.append(second)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[0] == 5 and gaps[-1] > 100
    assert 40 < len(times) < 100


def test_no_control_characters_even_when_the_run_smuggles_them(script, view, out, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    script.begin()
    bad = "bad\x1b[31m\x07\x9b2J\r\nname"
    script.listeners.emit("warned", message=bad)
    script.listeners.emit(
        "logged", trainer=script.trainer, number=399, values=script.values(399, **{f"loss/{bad}": 1.0, bad: 2.0})
    )
    script.listeners.emit("evaluated", metrics={bad: 1.0}, variant="")
    script.finish()
    assert all(c == "\n" or c.isprintable() for c in out.getvalue())
    assert len(lines(out, "warning: bad")) == 1


def test_a_failure_says_where(script, view, out):
    script.begin()
    script.train(stop=50)
    script.fail(KeyboardInterrupt())
    assert out.getvalue().splitlines()[-1] == "train: stopped after 5.0 s by KeyboardInterrupt"


def test_a_resumed_run_judges_the_time_left_by_its_own_steps(script, view, out):
    script.begin()
    script.train(start=300, stop=350)
    assert "5.0 s left" in lines(out, "train: step 350")[-1]


@pytest.mark.parametrize(
    "values", [{}, {"loss": float("nan")}, {"loss/only": 1.0}, {"tokens": 5.0}, {"l0": float("inf")}]
)
def test_any_subset_of_keys_is_enough(script, view, out, values):
    script.begin()
    script.listeners.emit("logged", trainer=script.trainer, number=399, values=values)
    assert "step 400/400" in lines(out, "train: step")[-1]


def test_a_long_silence_is_broken(script, view, out):
    """One block of activations, or one analyzer, may take many minutes."""
    script.begin()
    script.listeners.emit("phase_started", phase="train", total=1000)
    for seconds, done in ((20, 100), (20, 250), (5, 300), (30, 700)):
        script.now += seconds
        script.listeners.emit("harvest_advanced", done=done, total=1000)
        view.break_silence()
    assert lines(out, "train: goes on") == [
        "train: goes on, 40 s so far, 25 % of what it waits for is there",
        "train: goes on, 1 min 15 s so far, 70 % of what it waits for is there",
    ]
    script.listeners.emit("phase_ended", phase="train", seconds=75.0)
    script.now += 600
    view.break_silence()
    assert len(lines(out, "train: goes on")) == 2  # no phase is running
