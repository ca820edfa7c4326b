"""What the tests of the door, the training and the command line share: a tiny run, the command in process, fake plugins.

Fixtures here are taken into a folder's conftest by importing their names.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from saekit.kinds import HOOKS

WEIGHTS = Path("sae") / "sae_weights.safetensors"
STEPS, BATCH = 20, 64

NARROW_MODULE = """
import torch

def narrow():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 16)

def batches():
    return list(torch.randn(20, 32, 8, generator=torch.Generator().manual_seed(0)))
"""
"""A user's own module and its data, for the source `module`."""


@dataclass
class Outcome:
    """How a command ended: exit code, what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str

    def says(self, *words: str) -> None:
        """Assert that the message on stderr has all of these words."""
        for word in words:
            assert word in self.err, f"{word!r} is not in:\n{self.err}"


def tiny_table(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """A run file of 20 steps of 64 activations. A change's key has `__` between its parts: `training__lr=1e-3`."""
    table: dict[str, Any] = {
        "source": {
            "use": "text",
            "model": str(model),
            "data": str(data),
            "hook_point": "blocks.1.hook_out",
            "context": 32,
            "held_out": 0.2,
        },
        "architecture": {"use": "topk", "d_sae": 64, "k": 4},
        "loss": [{"use": "mse"}],
        "training": {
            "tokens": STEPS * BATCH,
            "batch_size": BATCH,
            "buffer": 512,
            "log_every": 1,
            "checkpoint_every": 5,
            "guard_steps": 10,
        },
        "evaluation": {"tokens": 500, "batch_size": 256},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        target = table
        for parent in parents:
            target = target[parent]
        target[last] = copy.deepcopy(value)
    return table


@pytest.fixture
def run_file(tiny_gpt2: Path, text_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny run file and gives its path; see `tiny_table` for the changes it takes."""
    numbers = itertools.count()

    def write(**changes: Any) -> Path:
        path = tmp_path / f"tiny{next(numbers)}.toml"
        path.write_text(tomli_w.dumps(tiny_table(tiny_gpt2, text_file, **changes)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`saekit ARGUMENTS` in this process. Whatever happens, no traceback may reach the user."""
    from saekit.cli import main

    monkeypatch.delenv("SAEKIT_DISABLE_PLUGINS", raising=False)

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["saekit", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err, captured.err
        return Outcome(code, captured.out, captured.err)

    return call


@dataclass
class Fakes:
    """Makes installed distributions out of nothing but a directory on the path."""

    site: Path
    monkeypatch: pytest.MonkeyPatch
    modules: set[str]

    def install(self, distribution: str, version: str, plugin: str, module: str, **sources: str) -> None:
        """A distribution whose entry point `plugin` names `module`; `sources` are its modules' texts by name."""
        info = self.site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[saekit]\n{plugin} = {module}\n")
        for name, text in sources.items():
            (self.site / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
            self.modules.add(name)
        importlib.invalidate_caches()

    def forget(self) -> None:
        """Let the next command import the modules anew, as a process of its own would."""
        for name in self.modules:
            sys.modules.pop(name, None)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a subprocess that sees these distributions as well."""
        return {**os.environ, "PYTHONPATH": str(self.site)}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[Fakes]:
    """Distributions that are installed for the length of one test."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    made = Fakes(site, monkeypatch, set())
    yield made
    made.forget()


def loss_plugin(name: str, body: str, target: str | None = None) -> str:
    """The source of a plugin file that offers one loss; `body` is what its function does, given `step`."""
    return "\n".join(
        [
            "from saekit import Component, Step, hookimpl",
            "",
            f"def {name}(step: Step):",
            textwrap.indent(textwrap.dedent(body).strip(), "    "),
            "",
            "@hookimpl",
            "def saekit_losses():",
            f"    yield Component({name!r}, {target or name})",
            "",
        ]
    )


def listener_plugin(kind: str, name: str, methods: str) -> str:
    """The source of a plugin file that offers one callback or tracker with these methods."""
    return "\n".join(
        [
            "from saekit import Component, hookimpl",
            "",
            f"class {name.capitalize()}:",
            textwrap.indent(textwrap.dedent(methods).strip(), "    "),
            "",
            "@hookimpl",
            f"def {HOOKS[kind]}():",
            f"    yield Component({name!r}, {name.capitalize()})",
            "",
        ]
    )


@pytest.fixture
def plugin_file(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a Python file that is given with --plugin."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


def leftovers(directory: Path) -> list[Path]:
    """Temporary files and directories that a whole write must not leave behind."""
    return [path for path in directory.rglob("*") if path.name.endswith(".tmp")]


def weights(run: Path) -> bytes:
    """The final weights of a run, to the bit."""
    return (run / WEIGHTS).read_bytes()


def write_config(sae: Path, cfg: dict[str, Any]) -> None:
    """Write the cfg.json of an SAE's directory as another program would, whose weights carry no checksum."""
    from safetensors.torch import load_file, save_file

    (sae / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    save_file(load_file(sae / WEIGHTS.name), sae / WEIGHTS.name)


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; every one must be whole."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def python(code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that runs `code`; its failure is the test's."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env={**(environment or os.environ), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


class Running:
    """A process that runs `python -m MODULE ARGUMENTS` in a directory, with the methods of a `subprocess.Popen` of text."""

    def __init__(self, module: str, arguments: Sequence[str | Path], at: Path | None, place: Path) -> None:
        from saekit.testing.tiny import forkserver

        self._out, self._err = place / "out", place / "err"
        told = (module, [*map(str, arguments)], at or Path.cwd(), self._out, self._err)
        self._process = forkserver().Process(target=self._main, args=told)
        self._process.start()

    @staticmethod
    def _main(module: str, arguments: list[str], at: Path, out: Path, err: Path) -> None:
        import torch

        for number, path in ((1, out), (2, err)):
            with path.open("wb") as file:
                os.dup2(file.fileno(), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and what they begin
        torch.set_num_threads(1)
        os.chdir(at)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__")

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"it still runs after {timeout} s"
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self._out.read_text(encoding="utf-8"), self._err.read_text(encoding="utf-8")


@contextlib.contextmanager
def running(*arguments: str | Path, module: str = "saekit", at: Path | None = None) -> Iterator[Running]:
    """`python -m MODULE ARGUMENTS` as a process of its own, killed in the end if it still runs."""
    with tempfile.TemporaryDirectory() as place:
        process = Running(module, arguments, at, Path(place))
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
