"""docs/examples/concept/table.toml: every row of the tables in docs/concepts.md can be trained, and is in the file."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from saekit.testing import tiny_run

ROOT = Path(__file__).parents[3]
FILE = ROOT / "docs" / "examples" / "concept" / "table.toml"
SMALL = {
    "600_000": "192", "1024": "32", "2048": "64", "50_000": "64",
    "every = 100": "every = 2, start = 2",
}  # fmt: skip


def test_every_variant_of_the_table_trains(tmp_path: Path) -> None:
    text = FILE.read_text(encoding="utf-8")
    for large, small in SMALL.items():
        assert large in text
        text = text.replace(large, small)
    table: dict[str, Any] = tomllib.loads(text)
    table["source"] = {"use": "synthetic", "d_in": 16, "n_features": 32, "probability": 0.1, "held_out": 256, "concepts": [0]}
    table["metric"] = [{"use": "l0"}]
    for variant in table["variant"]:
        variant.pop("analyzer", None)  # steering needs a model
    table["training"]["log_every"] = 1
    run = tiny_run(tmp_path / "run", **table)
    assert set(run.summary["variants"]) == {variant["name"] for variant in table["variant"]}
    for name in ("concept", "shuffled-labels", "activation"):
        lines = (run.directory / "variants" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        said = {key for line in lines for key in json.loads(line)}  # not of a step whose sequences are all of one class
        assert said >= {"concept/e_pos", "concept/e_neg", "concept/firing_pos"}


def test_the_rows_of_the_page_are_variants_of_the_file() -> None:
    variants = {variant["name"] for variant in tomllib.loads(FILE.read_text(encoding="utf-8"))["variant"]}
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").partition("## On the organism")[2]
    rows = set(re.findall(r"^\| ([\w-]+) \| [\d.]+", page, re.MULTILINE))
    assert len(rows) > 10
    assert rows <= variants
