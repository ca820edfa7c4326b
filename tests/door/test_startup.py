"""With fifty plugins installed, listing imports none of their targets, and a run imports those that it names.

What it costs in seconds: `saekit bench startup`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Fakes, Outcome, python

PLUGINS = 50
DECLARES = """
from saekit import Component, hookimpl

@hookimpl
def saekit_losses():
    yield Component("loss_{n}", "many_{n}_targets:loss", "Loss number {n}.")
"""
TARGET = "def loss(step, *, eps: float = 1.0):\n    return step.error.square().mean() * eps\n"
IMPORTED = """
import json, sys
sys.argv = ["saekit", *sys.argv[1:]]
from saekit.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
targets = sorted(name for name in sys.modules if name.endswith("_targets"))
print(json.dumps([targets, sorted({"torch", "numpy", "transformers", "pydantic"} & sys.modules.keys())]), file=sys.stderr)
"""


@pytest.fixture
def many(fakes: Fakes) -> Fakes:
    for n in range(PLUGINS):
        sources = {f"many_{n}": DECLARES.format(n=n), f"many_{n}_targets": TARGET}
        fakes.install(f"saekit-many-{n}", "1.0", f"many_{n}", f"many_{n}", **sources)
    return fakes


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plugins"], ["plugins", "--json"], ["plugins", "--requirements"], ["run", "--help"]]
)
def test_listing_imports_no_target_and_nothing_heavy(arguments: list[str], many: Fakes) -> None:
    done = python(IMPORTED, *arguments, environment=many.environment)
    assert json.loads(done.stderr.splitlines()[-1]) == [[], []]
    if arguments[0] == "plugins":
        assert all(f"loss_{n}" in done.stdout or f"saekit-many-{n}==1.0" in done.stdout for n in range(PLUGINS))


def test_a_plan_and_a_run_import_only_what_they_name(
    many: Fakes, command: Callable[..., Outcome], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    file = run_file(loss=[{"use": "mse"}, {"use": "loss_7"}, {"use": "many_23.loss_23"}])
    named = {"many_7_targets", "many_23_targets"}
    for arguments, expected in (
        (["run", file, "--dry-run"], named),
        (["run", file, "--directory", tmp_path / "run"], named),
        (["plugins", "show", "loss_3"], {"many_3_targets"}),
    ):
        many.forget()
        assert command(*arguments).code == 0
        assert sys.modules.keys() & {f"many_{n}_targets" for n in range(PLUGINS)} == expected
