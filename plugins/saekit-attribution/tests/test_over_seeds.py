"""The recipe at several seeds: what is shared, what is not repeated, and the ranges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from saekit_attribution.over_seeds import curve_ranges, main

import saekit


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The overrides of each run that was made; its rate is a tenth of its seed."""
    made: list[dict[str, Any]] = []

    def run(recipe: str, *, overrides: dict[str, Any], directory: Path) -> None:
        made.append(overrides)
        rate = overrides["training.seed"] / 10
        place = directory / "analysis" / "ablate"
        place.mkdir(parents=True)
        row = {"template_type": "like", "ranking": "exact", "latents": 10, "rate": rate, "neutral": 1 - rate, "kept": 1.0}
        scalars = {"like_latents": 10, "like_rate_after": rate, "like_rate_after_low": 0.0, "like_ce_rise": None}
        (place / "result.json").write_text(json.dumps({"scalars": scalars, "tables": {"curve": [row]}}), encoding="utf-8")
        (directory / "summary.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(saekit, "run", run)
    return made


def test_seeds_share_their_activations_and_are_not_run_twice(
    runs: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--directory", str(tmp_path), "-o", "analyzer.ablate.samples=200", "-o", "analyzer.ablate.data=organism"]
    assert main([*arguments, "--seeds", "1", "3"]) == 0
    assert main([*arguments, "--seeds", "1", "2", "3", "--out", str(tmp_path / "out.json")]) == 0
    assert [made["training.seed"] for made in runs] == [1, 3, 2]
    assert all(made["source.cache"] == str(tmp_path / "cache") and made["training.data_seed"] == 0 for made in runs)
    assert runs[0]["analyzer.ablate.samples"] == 200 and runs[0]["analyzer.ablate.data"] == "organism"
    printed = capsys.readouterr().out
    assert "| like | `exact` | 10 | 0.200 (0.100 to 0.300) | 0.800 (0.700 to 0.900) | 1.000 (1.000 to 1.000) |" in printed
    assert "| like_rate_after | 0.100 | 0.200 | 0.300 | 0.200 (0.100 to 0.300) |" in printed
    assert "| like_ce_rise | - | - | - | - |" in printed
    assert "rate_after_low" not in printed
    card = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert card["curve"][0]["rate"] == [0.1, 0.2, 0.3] and card["seeds"] == [1, 2, 3]


def test_a_seed_without_a_curve_is_left_out_of_its_range() -> None:
    assert curve_ranges({0: {"tables": {}, "scalars": {}}}) == []
