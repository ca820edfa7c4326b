"""docs/recovery.md: the run files that it names find the planted dictionary, and its table says what they say."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import saekit
from saekit.builtin.sources import SyntheticSource
from saekit.run_file import override, parse_override

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recovery.md"
FILES = ROOT / "docs" / "examples" / "recovery"
AT_LEAST = {
    "topk": 0.95,
    "batchtopk": 0.95,
    "matryoshka": 0.95,
    "standard": 0.9,
    "clipped": 0.9,
    "jumprelu": 0.9,
    "gated": 0.9,
}
UNTRAINED = {"training.tokens": 512, "training.lr": 1e-12}
"""One step that moves nothing: what is left is the SAE as it was initialised."""


def run_file(architecture: str) -> dict[str, Any]:
    return tomllib.loads((FILES / f"{architecture}.toml").read_text(encoding="utf-8"))


def documented() -> dict[str, list[str]]:
    """The rows of the page's table by architecture: settings, recovery, reverse, untrained, L0, EV, seconds."""
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(examples/recovery/\1\.toml\) \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_there_is_a_file_and_a_row_for_each_architecture() -> None:
    assert {path.stem for path in FILES.glob("*.toml")} == set(AT_LEAST) == set(documented())


@pytest.mark.parametrize("architecture", AT_LEAST)
def test_the_files_differ_in_architecture_and_losses_alone(architecture: str) -> None:
    table, other = run_file(architecture), run_file("topk")
    assert table.pop("architecture")["use"] == architecture
    assert {**table, "loss": other["loss"]} == {key: value for key, value in other.items() if key != "architecture"}


@pytest.mark.parametrize("architecture", AT_LEAST)
def test_the_settings_in_the_table_are_those_of_the_file(architecture: str) -> None:
    """They are written as overrides, which must then change nothing."""
    table = run_file(architecture)
    settings = re.findall(r"`([^`]+)`", documented()[architecture][0])
    assert settings
    for assignment in settings:
        changed = copy.deepcopy(table)
        override(changed, parse_override(assignment))
        assert changed == table, assignment


def test_the_encoder_is_what_limits_explained_variance() -> None:
    """The true code explains nearly everything; the largest products with the true directions do not give that code."""
    options = {key: value for key, value in run_file("topk")["source"].items() if key != "use"}
    source = SyntheticSource(**{**options, "held_out": 4096})
    source.open(device=torch.device("cpu"), dtype=torch.float32)
    (block,) = source.blocks("held_out", size=4096, seed=0)
    (code,) = source.codes("held_out", size=4096, seed=0)
    largest, latents = (block.x @ source.truth.T).topk(10, dim=1)
    guessed = torch.zeros(4096, 512).scatter(1, latents, largest.relu())
    text = PAGE.read_text(encoding="utf-8")
    for what, said in (
        (code.dense(), r"true code through the true directions explains ([\d.]+\d)"),
        (guessed, r"the true directions themselves explains only ([\d.]+\d)"),
    ):
        error = (block.x - what @ source.truth).square().sum() / (block.x - block.x.mean(0)).square().sum()
        (figure,) = re.findall(said, re.sub(r"\s+", " ", text))
        assert 1 - float(error) == pytest.approx(float(figure), abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", AT_LEAST)
def test_the_planted_dictionary_is_found(architecture: str, tmp_path: Path) -> None:
    """And far from it without training. The page's figures are met, but for what another machine's rounding changes."""

    def metrics(name: str, **changes: Any) -> dict[str, float]:
        overrides = {"training.device": "cpu", **changes}
        return saekit.run(FILES / f"{architecture}.toml", overrides=overrides, directory=tmp_path / name).summary[
            "metrics"
        ]

    untrained, found = metrics("untrained", **UNTRAINED), metrics("trained")
    assert found["recovery"] >= AT_LEAST[architecture]
    assert untrained["recovery"] < 0.3
    assert untrained["recovery"] == pytest.approx(untrained["recovery_control"], abs=0.01), "random rows are no better"
    recovery, reverse, control, l0, explained, _ = map(float, documented()[architecture][1:])
    assert found["recovery"] == pytest.approx(recovery, abs=0.015)
    assert found["recovery_reverse"] == pytest.approx(reverse, abs=0.015)
    assert untrained["recovery"] == pytest.approx(control, abs=0.002)
    assert found["l0"] == pytest.approx(l0, rel=0.05)
    assert found["explained_variance"] == pytest.approx(explained, abs=0.015)
