"""The time to list names: `saekit --help` and `saekit plugins` in fresh processes, with many plugins installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from saekit_bench.timing import alternate

DECLARES = """from saekit import Component, hookimpl

@hookimpl
def saekit_losses():
    yield Component("bench_{n}", "saekit_bench_{n}_targets:loss", "Loss number {n}.")
"""
COMMANDS = {"help": ["--help"], "plugins": ["plugins"], "plugins_json": ["plugins", "--json"]}


def time_startup(*, plugins: int, rounds: int) -> dict[str, Any]:
    """Seconds of each command, and of an interpreter that does nothing."""
    words = {"python": ["-c", "pass"], **{name: ["-m", "saekit", *command] for name, command in COMMANDS.items()}}
    with tempfile.TemporaryDirectory() as place:
        install_fakes(Path(place), plugins)
        run = partial(subprocess.run, env={**os.environ, "PYTHONPATH": place}, capture_output=True, check=True)
        candidates: dict[str, Callable[[], object]] = {
            name: partial(run, [sys.executable, *arguments]) for name, arguments in words.items()
        }
        timings = alternate(candidates, rounds, torch.device("cpu"))
    return {"plugins": plugins, "seconds": {name: asdict(timing) for name, timing in timings.items()}}


def install_fakes(site: Path, plugins: int) -> None:
    """Install this many distributions in the directory `site`, each with one loss whose target does not exist."""
    for n in range(plugins):
        info = site / f"saekit_bench_{n}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: saekit-bench-{n}\nVersion: 1.0\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(f"[saekit]\nbench_{n} = saekit_bench_{n}\n", encoding="utf-8")
        (site / f"saekit_bench_{n}.py").write_text(DECLARES.format(n=n), encoding="utf-8")
