"""A run killed at any moment goes on to the same weights, bit for bit.

SAEKIT_KILLS says how many moments are tried for each run, SAEKIT_KILL_SEED which; both are printed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Outcome, Running, leftovers, logged, running, weights

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SAEKIT_KILLS", "3"))
SEED = int(os.environ.get("SAEKIT_KILL_SEED", random.SystemRandom().randrange(10**6)))
STEPS, LOG_EVERY = 300, 3
LOGGED = list(range(LOG_EVERY - 1, STEPS, LOG_EVERY))
RUNS = {
    # Everything that keeps a state: dead latents for auxk, resampling with draws of its own, a shuffle of several blocks.
    "with dead latents and resampling": {
        "architecture": {"use": "topk", "d_sae": 256, "k": 4},
        "loss": [{"use": "mse"}, {"use": "auxk", "weight": 0.1}, {"use": "l1", "weight": 1e-3}],
        "callback": [{"use": "resample", "every": 13, "below": 0.02, "memory": 0.8}],
        "training__dead_after": 512,
    },
    "plain": {},
    "of variants": {
        "callback": [{"use": "resample", "every": 13, "below": 0.02}],
        "variant": [{"name": "one"}, {"name": "two", "architecture": {"d_sae": 128}, "training": {"seed": 1}}],
    },
    "with a code that becomes sparse": {"architecture": {"use": "standard", "d_sae": 128}, "loss": [{"use": "mse"}, {"use": "l1"}]},
}


@pytest.mark.parametrize("which", RUNS)
def test_a_killed_run_goes_on_to_the_same_bits(
    which: str,
    command: Callable[..., Outcome],
    run_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def say(text: str) -> None:
        with capsys.disabled():  # seeds and moments are seen where nothing fails, too
            print(text)

    changes = {
        "training__tokens": STEPS * 64,
        "training__checkpoint_every": 7,
        "training__log_every": LOG_EVERY,
        "training__lr": {"schedule": "warmup_decay", "to": 3e-3, "warmup": 10},
        **RUNS[which],
    }
    file = run_file(**changes)
    undisturbed = tmp_path / "undisturbed"
    with running("run", file, "--directory", undisturbed) as process:
        begun = seen(process, (undisturbed / "run.toml").exists)
        training = seen(process, lambda: lines_of(undisturbed) > 0)
        trained = seen(process, lambda: lines_of(undisturbed) == len(LOGGED))
        process.wait()
        assert process.returncode == 0, process.communicate()
        ended = time.monotonic()
    assert [line["step"] for line in logged(members(undisturbed)[0])] == LOGGED
    if "dead" in which:
        assert any(line.get("loss/auxk") for line in logged(undisturbed))
        assert max(line["dead"] for line in logged(undisturbed)) > 0
    if "sparse" in which:  # it changes to the other way of computing, at 10 % density, in the middle
        assert logged(undisturbed)[-1]["l0"] < 12.8 < logged(undisturbed)[0]["l0"]

    draw = random.Random(SEED)
    before, after = training - begun, ended - trained
    say(f"\n{which}: seed {SEED}, {KILLS} kills; training from {before:.2f} s to {ended - after - begun:.2f} s")
    for number in range(KILLS):
        run = tmp_path / f"run{number}"
        # One moment in each part of the run: a sixth of them before training, by the clock, four in it, one after it.
        moment = (number + draw.random()) / KILLS
        lines = 0 if moment < 1 / 6 else min(len(LOGGED), 1 + int((moment - 1 / 6) * 6 / 4 * len(LOGGED)))
        seconds = draw.random() * (before if lines == 0 else after if lines == len(LOGGED) else 0.02)
        killed = kill(run, lines, seconds, "run", file, "--directory", run)
        again = draw.random() < 0.3 and killed
        if again:  # and once more, somewhere in what was left
            kill(run, 0, draw.random() * (ended - begun), "run", "--resume", run)
        kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
        say(f"  after {lines} lines and {seconds:.3f} s{', and again' if again else ''}: {kept[-1:] or 'no checkpoint'}")
        resumed = command("run", "--resume", run)
        assert resumed.code == 0, resumed.err
        for one, whole in zip(members(run), members(undisturbed), strict=True):
            assert weights(one) == weights(whole), f"seed {SEED}, kill {number}"
            assert [line["step"] for line in logged(one)] == LOGGED
            assert same_numbers(one, whole)
        assert not leftovers(run)
        assert (run / "report.html").is_file()


def members(run: Path) -> list[Path]:
    """The directory of each SAE of a run."""
    return sorted((run / "variants").glob("*")) or [run]


def lines_of(run: Path) -> int:
    """How many lines metrics.jsonl has, of the first variant where there are several."""
    path = members(run)[0] / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def seen(process: Running, condition: Callable[[], bool]) -> float:
    """Wait for a condition, or for the end of the process; when that was."""
    while not condition() and process.poll() is None:
        time.sleep(0.001)
    return time.monotonic()


def kill(run: Path, lines: int, seconds: float, *arguments: str | Path) -> bool:
    """Run, and send SIGKILL so long after so many lines were logged; whether that was before the run's end."""
    with running(*arguments) as process:
        seen(process, (run / "run.toml").exists)
        deadline = seconds + seen(process, lambda: lines_of(run) >= lines)
        seen(process, lambda: time.monotonic() >= deadline)
        alive = process.poll() is None
        if alive:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode in (0, -signal.SIGKILL), process.communicate()
    return alive


def same_numbers(one: Path, other: Path) -> bool:
    """Whether two runs logged the same and measured the same, but for what a clock says."""
    clock = {"seconds", "tokens_per_second"}
    lines = [[{k: v for k, v in line.items() if k not in clock} for line in logged(run)] for run in (one, other)]
    metrics = [json.loads((run / "summary.json").read_text())["metrics"] for run in (one, other)]
    return lines[0] == lines[1] and metrics[0] == metrics[1]
