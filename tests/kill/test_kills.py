"""A small share of `make kills`: a few kills of two of its runs."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_runs_end_at_the_same_bits(tmp_path: Path) -> None:
    seed = str(random.SystemRandom().randrange(10**6))
    script = Path(__file__).with_name("kills.py")
    done = subprocess.run(
        [sys.executable, script, "8", "--seed", seed, "--case", "hsae", "--case", "cached"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    print(done.stdout)  # the seed and the moments
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 kills" in done.stdout
