"""The live view: what a user must see at each moment, and a terminal that is left clean whatever happens."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from saekit.terminal.block import draw
from saekit.terminal.state import Phase, RunState, Training, Trend
from saekit.terminal.view import LiveView


def terminal(width: int = 80, height: int = 40) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system="truecolor")


def shown(state: RunState, now: float, width: int = 80, height: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(draw(state, width, height, now))
    return console.file.getvalue()


@pytest.fixture
def view(script):
    view = script.watch(LiveView(terminal(), clock=script.clock))
    yield view
    view.close()


def row(text: str, start: str) -> list[str]:
    """The cells of the line that starts with `start`."""
    line = next(line for line in text.splitlines() if line.strip().startswith(start))
    return re.split(r"\s{2,}", line.strip())


def test_in_the_middle_of_training(script, view):
    script.begin()
    script.train(stop=200)
    text = shown(view.state, script.now)
    assert "topk 4,096 · organism · blocks.2.hook_out" in text
    assert row(text, "✓ prepare")[-1] == "4.0 s"
    train = next(line for line in text.splitlines() if " train " in line)
    assert "50 %" in train and "20 s left" in train
    assert (
        "step 200 of 400" in text
        and "409.6k of 819.2k tokens" in text
        and "16.4k tokens/s" in text
        and "lr 0.001" in text
    )
    assert row(text, "total")[1] == "0.6000"
    assert row(text, "mse")[1:4] == ["0.5000", "1", "0.5000"]
    assert row(text, "hoyer")[1:4] == ["26.25", "0.002", "0.0525"]
    assert "explained variance" in text and "41 (1.0 %)" in text and "gate temperature" in text and "1.750" in text
    assert "harvest" not in text  # it was passed over: training harvests as it goes


def test_metrics_analyses_and_warnings_come_in(script, view):
    script.begin()
    script.train()
    for number in range(5):
        script.listeners.emit("warned", message=f"warning number {number} " + "with a long explanation " * 20)
    script.listeners.emit("phase_ended", phase="train", seconds=40.0)
    script.listeners.emit("evaluated", metrics={"ce_recovered": 0.9512, "probe_score": None}, variant="")
    steered = SimpleNamespace(scalars={"shift": None, "strength": 15.0})
    script.listeners.emit("analysed", name="steer", result=steered, variant="")
    text = shown(view.state, script.now)
    assert "CE recovered" in text and "0.9512" in text and "not defined" in text
    assert "steer   shift not defined   strength 15" in text
    assert "! warning number 4" in text and "and 2 earlier" in text


def test_a_finished_run_leaves_the_summary_and_nothing_on_stdout(script, view, capsys):
    script.begin()
    script.train()
    script.finish()
    text = view.console.file.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    rest = text[text.rindex("\x1b[?25h") :]
    assert "0.9134" in rest and "report.html" in rest
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


@pytest.mark.parametrize("when", ["before", "prepare", "train"])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failure_leaves_the_terminal_clean(script, view, when, error):
    out, err = sys.stdout, sys.stderr
    if when == "prepare":
        script.listeners.emit("run_started", run=script.run)
        script.listeners.emit("phase_started", phase="prepare", total=None)
    if when == "train":
        script.begin()
        script.train(stop=100)
    script.fail(error)
    text = view.console.file.getvalue()
    assert text.rfind("\x1b[?25h") >= text.rfind("\x1b[?25l")
    assert (sys.stdout, sys.stderr) == (out, err)
    if when != "before":
        last = text[text.rindex("\x1b[?25h") :]
        assert "✗" in last and when in last
    script.fail(error)  # a second call does no harm


def test_drawing_goes_on_while_the_run_is_busy(script):
    view = script.watch(LiveView(terminal()))
    try:
        script.listeners.emit("run_started", run=script.run)
        script.listeners.emit("phase_started", phase="prepare", total=None)
        before = len(view.console.file.getvalue())
        time.sleep(0.7)
        frames = view.console.file.getvalue()[before:].count("prepare")
        assert 1 <= frames <= 6
    finally:
        view.close()


def test_hooks_cost_microseconds(script, view):
    script.begin()
    began = time.perf_counter()
    for done in range(20_000):
        view.phase_advanced("train", done)
    assert (time.perf_counter() - began) / 20_000 < 50e-6


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("height", [6, 14, 24, 60])
def test_the_block_fits_the_terminal(script, view, width, height):
    script.begin()
    script.train(stop=200)
    more = {f"loss/third_party_loss_with_a_long_name_{i}": 1.0 for i in range(12)} | {
        f"measure_{i}": 2.0 for i in range(30)
    }
    script.listeners.emit("logged", trainer=script.trainer, number=200, values=more)
    for number in range(4):
        script.listeners.emit("warned", message=f"warning {number}: " + "语言 " * 60)
    text = shown(view.state, script.now, width, height)
    lines = text.splitlines()
    assert len(lines) < height
    assert max(cell_len(line) for line in lines) <= width
    assert "train" in text


def test_a_short_terminal_keeps_the_total_and_counts_the_rest(script, view):
    script.begin()
    script.listeners.emit(
        "logged", trainer=script.trainer, number=9, values={"loss": 1.0} | {f"loss/l{i}": 1.0 for i in range(12)}
    )
    text = shown(view.state, script.now, 80, 20)
    assert "total" in text and "and 7 more" in text


def test_several_variants_are_one_row_each(script, view):
    script.begin()
    for name, loss in (("topk-16", 0.5), ("topk-64", 0.25)):
        trainer = SimpleNamespace(variant=name, total_steps=400, number=9, sae=SimpleNamespace(d_sae=64))
        view.state.training_of(trainer).log(10, script.values(9, loss=loss))
    del view.state.training[""]
    text = shown(view.state, script.now)
    assert row(text, "topk-16")[1:3] == ["10", "0.5000"]
    assert row(text, "topk-64")[1:3] == ["10", "0.2500"]


def test_metrics_of_several_variants_are_one_row_each(script, view):
    script.begin()
    for name, variance in (("topk-16", 0.5), ("topk-64", None)):
        metrics = {"explained_variance": variance, "l0": 16.0, **{f"more_{i}": 1.0 for i in range(9)}}
        script.listeners.emit("evaluated", metrics=metrics, variant=name)
        script.listeners.emit("analysed", name="steer", result=SimpleNamespace(scalars={"shift": 2.0}), variant=name)
    text = shown(view.state, script.now)
    assert row(text, "topk-16")[1:3] == ["0.5000", "16"]
    assert row(text, "topk-64")[1:3] == ["not defined", "16"]
    assert "more 0" in text and "more 8" not in text  # as many columns as there is room for
    assert "topk-64 steer" in text


def test_names_cannot_steer_the_terminal_or_write_markup(script, view):
    script.begin()
    bad = "[red]x[/nope]\x1b[2J\x9b"
    script.listeners.emit(
        "logged", trainer=script.trainer, number=9, values={"loss": 1.0, f"loss/{bad}": 1.0, bad: 1.0}
    )
    script.listeners.emit("warned", message=bad)
    script.listeners.emit("analysed", name=bad, result=SimpleNamespace(scalars={bad: bad}), variant="")
    script.listeners.emit("evaluated", metrics={bad: 1.0}, variant="")
    text = shown(view.state, script.now)
    assert "[red]x[/nope]" in text
    assert all(c == "\n" or c.isprintable() for c in text)


floats = st.one_of(st.floats(), st.just(0.0), st.integers(-5, 10**13))
keys = st.sampled_from(
    ["loss", "loss/mse", "weight/mse", "l0", "dead", "lr", "tokens", "tokens_per_second", "explained_variance"]
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.one_of(keys, st.text(max_size=12)), floats, max_size=8), max_size=8),
    st.integers(1, 150),
)
def test_no_logged_value_breaks_the_block(lines, width):
    state = RunState()
    state.phase("train").begin(1000, 0.0)
    trainer = SimpleNamespace(total_steps=len(lines), number=0, variant="", sae=SimpleNamespace(d_sae=64))
    for number, values in enumerate(lines):
        state.training_of(trainer).log(number + 1, values)
        state.phase("train").advance(number * 100, float(number))
    shown(state, 10.0, width, 30)


def test_a_silent_loss_keeps_its_row():
    training = Training()
    training.log(1, {"loss": 1.0, "loss/auxk": 0.5, "weight/auxk": 0.1})
    training.log(2, {"loss": 0.9, "weight/auxk": 0.1})
    assert [(r.name, r.value, r.contribution) for r in training.losses()] == [("auxk", 0.5, 0.05)]


def test_time_left_follows_the_recent_rate():
    phase = Phase("train")
    phase.begin(1000, 0.0)
    assert phase.left(0.0) is None
    for second in range(1, 101):
        phase.advance(second, float(second))  # one a second
    assert phase.left(100.0) == pytest.approx(900)
    for second in range(101, 141):
        phase.advance(100 + (second - 100) * 5, float(second))  # then five
    assert phase.left(140.0) == pytest.approx((1000 - 300) / 5, rel=0.05)
    assert phase.left(150.0) == pytest.approx((1000 - 300) / 5 - 10, rel=0.06)


def test_a_trend_keeps_the_shape_of_a_long_run_in_little_memory():
    trend = Trend()
    total = 100_000
    for i in range(total):
        trend.add(i / total)
    points = trend.points(20)
    assert len(points) == 20 and len(trend._means) <= Trend.CAPACITY
    assert points == sorted(points) and points[0] < 0.06 and points[-1] > 0.94


PTY_RUN = """
import sys
from saekit.terminal import choose_view
view = choose_view(json={json})
print(type(view).__name__, file=sys.stderr)
from types import SimpleNamespace as N
member = N(config=N(architecture=N(d_sae=8)), architecture=N(component=N(name="topk")), graph=None)
run = N(directory=N(path=__import__("pathlib").Path("runs/x")), plan=N(members=[member], facts={{}}))
view.run_started(run)
view.phase_started("prepare", None)
view.run_failed(*([ValueError()] if {json} or type(view).__name__ == "LinesView" else []))
"""


def on_a_terminal(json: bool = False, **environment: str) -> tuple[str, str]:
    """stdout (a pipe) and stderr (a pseudo-terminal) of a run that fails."""
    import pty

    leader, follower = pty.openpty()
    variables = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    variables |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PTY_RUN.format(json=json)],
        stdout=subprocess.PIPE,
        stderr=follower,
        env=variables,
        text=True,
    )
    os.close(follower)
    seen = b""
    try:
        while chunk := os.read(leader, 65536):
            seen += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(leader)
    assert done.returncode == 0, seen.decode()
    return done.stdout, seen.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_the_choice_of_the_view_on_a_terminal():
    out, err = on_a_terminal()
    assert out == "" and "LiveView" in err and err.rfind("\x1b[?25h") > err.rfind("\x1b[?25l") > 0
    for out, err in (
        on_a_terminal(NO_COLOR="1"),
        on_a_terminal(TERM="dumb"),
        on_a_terminal(json=True),
        on_a_terminal(PYTHONIOENCODING="ascii"),
    ):
        assert out == "" and "LinesView" in err and "\x1b" not in err


def test_without_a_terminal_lines_are_plain(monkeypatch):
    from saekit.terminal import choose_view

    monkeypatch.setenv("FORCE_COLOR", "1")
    assert type(choose_view()).__name__ == "LinesView"


def test_a_constant_curve_is_drawn_at_its_value() -> None:
    from saekit.terminal.block import _sparkline

    assert _sparkline([3.0, 3.0, 3.0 + 1e-12]).plain == "███"
    assert _sparkline([0.0, 0.0]).plain == _sparkline([-2.0, -2.0]).plain == "▁▁"
    assert _sparkline([1.0, 2.0, 4.0]).plain == "▁▄█"
