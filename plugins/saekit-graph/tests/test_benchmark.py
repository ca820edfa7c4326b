"""The memory for building a graph, in a separate process, at a reduced size; docs/graphs.md has the full size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saekit.testing.tiny import forkserver

MB = 1 << 20


MEASURE = """
import torch
from saekit_graph.benchmark import main
torch.set_num_threads(1)
main(arguments)
"""


def measured(place: Path, *arguments: str) -> dict[str, Any]:
    out = place / "card.json"
    process = forkserver().Process(target=exec, args=(MEASURE, {"arguments": [*arguments, "--out", str(out)]}))
    process.start()
    process.join()
    assert process.exitcode == 0
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_cosine_holds_one_block_and_no_copy_of_the_dictionary(tmp_path: Path) -> None:
    """40,000 latents x 64: all cosines would be 6.4 GB. Beyond an almost empty build: a block of 256 MB and its top 8."""
    small = measured(tmp_path, "cosine", "--latents", "64", "--width", "64", "--k", "8", "--rounds", "1")
    card = measured(
        tmp_path, "cosine", "--latents", "40000", "--width", "64", "--k", "8", "--rows", "1", "--rounds", "1", "--whole"
    )
    assert card["peak_bytes"] - small["peak_bytes"] < 400 * MB
    assert card["whole_seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("builder", ["coactivation", "correlation"])
def test_joint_builders_hold_the_firings_and_one_block(tmp_path: Path, builder: str) -> None:
    """20,000 latents: all pairs would be 3.2 GB in float64. Beyond an almost empty build: 640,000 firings and a block."""
    few = measured(tmp_path, builder, "--latents", "64", "--tokens", "100", "--k", "8")
    card = measured(tmp_path, builder, "--latents", "20000", "--tokens", "20000", "--k", "8")
    assert card["peak_bytes"] - few["peak_bytes"] < 450 * MB
    assert card["edges"] > 100_000
