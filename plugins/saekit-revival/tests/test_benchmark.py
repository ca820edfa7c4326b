"""The benchmark compares steps with and without `usage_kl`, and the run file of the page can be planned and carried out."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
from saekit_revival import benchmark

import saekit
from saekit.plugins import Registry
from saekit.run_file import parse_config
from saekit.runner.plan import plan_run

RUN_FILE = Path(__file__).parents[3] / "docs" / "examples" / "revival" / "schedules.toml"


def test_it_prints_a_paired_ratio(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    sizes = ["--d-in", "16", "--d-sae", "64", "--batch", "32", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *sizes, "--architecture", "topk", "--architecture", "jumprelu"])
    benchmark.main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all("with usage_kl" in line and "times (" in line for line in said[1:])


def test_it_refuses_sizes_that_cannot_be(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--d-sae", "8"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--d-sae at least 32" in capsys.readouterr().err


def test_the_run_file_of_the_schedules_is_planned_whole() -> None:
    plan = plan_run(parse_config(tomllib.loads(RUN_FILE.read_text(encoding="utf-8")), str(RUN_FILE)), Registry()).members[0]
    training = plan.config.training
    assert training.tokens // training.batch_size == 30_000
    assert max(plan.sections["callback"][0].options["at"]) < 30_000


def test_the_run_file_of_the_schedules_runs_small(tmp_path: Path) -> None:
    small = {
        "source.d_in": 16,
        "source.n_features": 32,
        "source.held_out": 512,
        "architecture.d_sae": 64,
        "training.tokens": 32 * 24,
        "training.batch_size": 32,
        "training.buffer": 256,
        "training.log_every": 1,
        "training.device": "cpu",
        "evaluation.tokens": 256,
        "callback.resample.at": [8, 16],
        "callback.resample.below": 0.6,
        "callback.resample.after": 5,
    }
    run = saekit.run(RUN_FILE, overrides=small, directory=tmp_path / "run")
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    l1, usage = ([line[f"weight/{name}"] for line in lines] for name in ("l1", "usage_kl"))
    assert l1[0] == 0 and l1 == sorted(l1) and l1[12] == pytest.approx(12 / 6000 * 5e-3)
    assert usage[0] == pytest.approx(1e-3 / 1000) and usage == sorted(usage)  # still in its warm-up
    assert run.summary["analysis"]["resample"]["revived_alive_share_n"] > 0
