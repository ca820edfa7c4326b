"""The comparison of methods tunes each to the same L0 on a seed of its own, and says what its runs say."""

import json
import math
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest
import tomli_w
from saekit_revival import comparison
from saekit_revival.comparison import Study, next_guess
from saekit_revival.comparison_table import Row, table

import saekit
from saekit import UsageError

SMALL = {
    "source": {"d_in": 8, "n_features": 16, "held_out": 1024, "probability": 0.1, "power": 0.0},
    "architecture": {"d_sae": 32},
    "training": {"tokens": 64 * 60, "batch_size": 64, "dead_after": 256, "buffer": 2048, "log_every": 50, "device": "cpu"},
    "evaluation": {"tokens": 512},
}


def small_file(place: Path, methods: int = 2) -> str:
    """The recipe, much smaller, with its first methods."""
    run_file = tomllib.loads(resources.files("saekit_revival").joinpath("comparison.toml").read_text(encoding="utf-8"))
    for section, keys in SMALL.items():
        run_file[section] |= keys
    run_file["callback"] = [{"use": "revivals", "every": 10, "after": 20}]
    run_file["variant"] = run_file["variant"][:methods]
    path = place / "small.toml"
    path.write_text(tomli_w.dumps(run_file), encoding="utf-8")
    return str(path)


def test_every_method_of_the_recipe_trains(tmp_path: Path) -> None:
    small = {f"{section}.{key}": value for section, keys in SMALL.items() for key, value in keys.items()}
    run = saekit.run("dead_latents", overrides={**small, "training.tokens": 64 * 12}, directory=tmp_path / "run")
    assert list(run.variants) == ["none", "resample", "auxk", "ghost", "usage_kl", "together"]
    assert all("revivals" in variant.summary["analysis"] for variant in run.variants.values())
    used = {name: {loss["use"] for loss in resolved(run, name)["loss"] if loss["weight"]} for name in run.variants}
    assert {name for name in used if "ghost" in used[name]} == {"ghost", "together"}
    assert used["none"] == used["resample"] == {"mse", "l1"}


def resolved(run, variant: str) -> dict:
    return tomllib.loads((run.directory / "variants" / variant / "run.toml").read_text(encoding="utf-8"))


def test_it_tunes_reports_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    command = ["comparison", small_file(tmp_path), "--directory", str(tmp_path / "runs"), "--seeds", "1", "--l0", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--tries", "2", "-o", "training.threads=1"])
    comparison.main()
    said = capsys.readouterr().out
    assert "| none |" in said and "| resample |" in said
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs[:2] == ["seed-0", "seed-0-control"] and runs[2] == "tune-0"
    seeds = {name: json.loads((tmp_path / "runs" / name / "provenance.json").read_text())["seed"] for name in runs}
    assert seeds == {name: 0 if name.startswith("seed") else comparison.TUNING_SEED for name in runs}
    monkeypatch.setattr(saekit, "run", lambda *a, **k: pytest.fail("everything was there already"))
    comparison.main()
    assert capsys.readouterr().out == said


def test_the_secants_find_the_weight_of_a_wanted_l0() -> None:
    """Of an L0 that falls with the weight, not quite as a power, the wanted value is found in five trainings."""

    def log_l0(log_weight: float) -> float:
        return 2.0 - 0.6 * log_weight - 0.05 * log_weight**2

    wanted, x, seen = math.log(8.0), math.log(0.03), []
    for _ in range(6):
        seen.append((x, log_l0(x)))
        x = next_guess(seen, wanted)
    assert abs(log_l0(x) - wanted) < math.log(1 + comparison.CLOSE)
    assert next_guess([(0.0, 5.0)], 0.0) == pytest.approx(math.log(comparison.STEEPEST))  # no further at once


def test_the_table_adds_latents_up_and_shows_the_range_of_the_seeds() -> None:
    found = [{"revived": 10, "revived_alive_share": share, "revived_alive_share_n": 10} for share in (0.5, 0.9)]
    control = {"analysis": {"revivals": {"redrawn_alive_share": 0.25, "redrawn_alive_share_n": 4}}}
    rows = [
        Row.of("x", {"analysis": {"revivals": f}, "metrics": {"dead_fraction": d, "explained_variance": 0.5, "l0": 8}}, control)
        for f, d in zip(found, (0.1, 0.3), strict=True)
    ]
    said = table(rows).splitlines()[-1]
    assert "20.0% (10.0% to 30.0%)" in said and "of 20 |" in said and "70%" in said and "25% " in said and "of 8 |" in said
    assert said.endswith("| none |")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.update(callback=[]), "no callback `revivals`"),
        (lambda f: f.update(loss=[{"use": "mse"}], variant=f["variant"][:1]), "has no such key"),
        (lambda f: f.pop("variant"), r"has no \[\[variant\]\]"),
    ],
)
def test_a_run_file_that_cannot_be_compared_is_refused(tmp_path: Path, change, words: str) -> None:
    path = Path(small_file(tmp_path, methods=1))
    run_file = tomllib.loads(path.read_text(encoding="utf-8"))
    run_file["training"]["tokens"] = 128
    change(run_file)
    path.write_text(tomli_w.dumps(run_file), encoding="utf-8")
    with pytest.raises(UsageError, match=words) as error:
        Study(str(path), tmp_path / "runs", {}, lambda line: None).tuned("loss.l1.weight", 8.0, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["-o", "training.seed"], ["--l0", "nan"]])
def test_bad_arguments_are_told(monkeypatch: pytest.MonkeyPatch, capsys, wrong: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["comparison", *wrong])
    with pytest.raises(SystemExit) as stopped:
        comparison.main()
    assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err
