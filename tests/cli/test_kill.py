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
from helpers import Outcome, leftovers, logged, running, weights

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SAEKIT_KILLS", "3"))
SEED = int(os.environ.get("SAEKIT_KILL_SEED", random.SystemRandom().randrange(10**6)))
STEPS = 400  # long enough that training, not loading, is most of the run
RUNS = {
    # Everything that keeps a state: dead latents for auxk, resampling with draws of its own, a shuffle of several blocks.
    "with dead latents and resampling": {
        "architecture": {"use": "topk", "d_sae": 256, "k": 4},
        "loss": [{"use": "mse"}, {"use": "auxk", "weight": 0.1}, {"use": "l1", "weight": 1e-3}],
        "callback": [{"use": "resample", "every": 13, "below": 0.02, "memory": 0.8}],
        "training__dead_after": 512,
    },
    "plain": {},
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
        "training__log_every": 3,
        "training__lr": {"schedule": "warmup_decay", "to": 3e-3, "warmup": 10},
        **RUNS[which],
    }
    file = run_file(**changes)
    undisturbed = tmp_path / "undisturbed"
    began = time.monotonic()
    with running("run", file, "--directory", undisturbed) as process:
        since_begun = None
        while process.poll() is None:
            if since_begun is None and (undisturbed / "run.toml").exists():
                since_begun = time.monotonic()
            time.sleep(0.005)
        assert process.returncode == 0, process.communicate()
    assert since_begun is not None
    length = time.monotonic() - since_begun
    steps = [line["step"] for line in logged(undisturbed)]
    assert steps == sorted({*range(2, STEPS, 3), STEPS - 1})
    if "dead" in which:
        assert any(line.get("loss/auxk") for line in logged(undisturbed))
        assert max(line["dead"] for line in logged(undisturbed)) > 0

    moments = random.Random(SEED)
    say(f"\n{which}: seed {SEED}, {KILLS} kills in {length:.2f} s after {since_begun - began:.2f} s")
    for number in range(KILLS):
        run = tmp_path / f"run{number}"
        # One moment in each part of the run, so that few kills still meet preparation, training and what comes after.
        moment = length * (number + moments.random()) / KILLS
        killed = kill_after(moment, run, "run", file, "--directory", run)
        again = moments.random() < 0.3 and killed
        if again:  # and killed once more, somewhere in what was left
            kill_after(moments.random() * length / 2, run, "run", "--resume", run)
        kept = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
        say(f"  {moment:.3f} s{' and again' if again else ''}: {kept[-1:] or 'no checkpoint'}")
        resumed = command("run", "--resume", run)
        assert resumed.code == 0, resumed.err
        assert weights(run) == weights(undisturbed), f"seed {SEED}, kill {number} at {moment:.3f} s"
        assert [line["step"] for line in logged(run)] == steps
        assert same_numbers(run, undisturbed)
        assert not leftovers(run)
        assert (run / "report.html").is_file()


def kill_after(seconds: float, run: Path, *arguments: object) -> bool:
    """Run, and send SIGKILL so long after run.toml was there; whether that was before the run's end."""
    with running(*arguments) as process:  # type: ignore[arg-type]
        while not (run / "run.toml").exists() and process.poll() is None:
            time.sleep(0.002)
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
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
