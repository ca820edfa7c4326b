"""`saekit bench`: that each benchmark answers, and with what; never how fast anything is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Outcome

SMALL = ("-o", "architecture.d_sae=64", "-o", "training.threads=1", "-o", "training.device=cpu")


def answer(command, *arguments: object) -> dict:
    done = command("bench", *arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_step(architecture: str, command) -> None:
    settings = ("-o", f"architecture.use={architecture}", "-o", "architecture.k=4", "--d-in", 16, "--batch", 32)
    found = answer(command, "step", "quickstart", *SMALL, *settings, "--rounds", 2)
    assert (found["architecture"], found["d_in"], found["d_sae"], found["batch"]) == (architecture, 16, 64, 32)
    assert found["l0"] == pytest.approx(4, abs=1) and found["products"]["step"]["median"] > 0
    assert found["products"].keys() == {"step"}


def test_step_at_a_given_l0(run_file, command) -> None:
    file = run_file(architecture={"use": "standard", "d_sae": 256}, loss=[{"use": "mse"}])
    settings = ("--d-in", 32, "--batch", 256, "--l0", 6, "-o", "training.lr=1e-9")
    found = answer(command, "step", file, *settings, "--rounds", 1)
    assert found["l0"] == pytest.approx(6, rel=0.2)  # of 128 as it begins
    assert found["peak_memory_in_pre_activations"] is None or found["peak_memory_in_pre_activations"] >= 0


def test_harvest(run_file, command) -> None:
    found = answer(command, "harvest", run_file(), "--tokens", 64, "--rounds", 1)
    assert found["tokens_per_second"].keys() == {"bare", "harvest"} and found["ratio"] > 0


def test_parity_refuses_what_it_does_not_know(command) -> None:
    done = command("bench", "parity", "--architecture", "topq")
    assert done.code == 2 and "'topq'. Did you mean 'topk'" in done.err


@pytest.mark.slow
def test_parity_trains_both_sides_once(run_file, command, tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    rows = tmp_path / "rows.jsonl"
    small = ("--tokens", 640, "--held-out", 100, "--batch", 64, "--seeds", 1, "--rows", rows)
    arguments = ("parity", run_file(), "-o", "architecture.d_sae=96", "--architecture", "topk", *small, "--json")
    first = command("bench", *arguments)
    assert first.code == 0, first.err
    table, kept = json.loads(first.out), rows.read_text()
    assert [line["l0"] for line in table] == pytest.approx([16, 32, 64], rel=1e-3) or len(table) == 3
    assert all(line["difference"] == pytest.approx(line["saekit"] - line["sae_lens"]) for line in table)
    assert len(kept.splitlines()) == 6  # three sparsities, two sides
    again = command("bench", *arguments)
    assert json.loads(again.out) == table and rows.read_text() == kept and not again.err.strip()


@pytest.mark.slow
def test_training_beside_sae_lens(command, tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    settings = ("-o", "training.tokens=2048", "-o", "training.batch_size=512", "-o", 'source.kinds=["sycophancy"]')
    found = answer(command, "training", "quickstart", *SMALL, *settings, "--peers")
    for side in ("saekit", "sae_lens"):
        assert found[side]["tokens_per_second"] > 0 and 0 < found[side]["l0"] <= 64
    assert found["activations"] == 2048


def test_startup(command) -> None:
    found = answer(command, "startup", "--plugins", 3, "--rounds", 1)
    assert found["plugins"] == 3
    assert found["seconds"].keys() == {"python", "help", "plugins", "plugins_json"}
    assert all(0 < timing["low"] <= timing["median"] <= timing["high"] < 60 for timing in found["seconds"].values())


def test_the_benchmark_times_every_variant_against_its_steps_alone(
    run_file: Callable[..., Path], command: Callable[..., Outcome]
) -> None:
    file = run_file(variant=[{"name": "a"}, {"name": "b", "architecture": {"d_sae": 96}}])
    result = json.loads(command("bench", "variants", file, "--rounds", "2", "--steps", "3", "--json").out)
    assert set(result["seconds"]) == {"together", "harvest", "a alone", "b alone"}
    apart = sum(seconds for name, seconds in result["seconds"].items() if name != "together")
    assert result["ratio"]["median"] == pytest.approx(result["seconds"]["together"] / apart)
    assert (result["variants"], result["batch"]) == (2, 64)


def test_the_benchmark_makes_variants_of_a_file_without_any(
    run_file: Callable[..., Path], command: Callable[..., Outcome]
) -> None:
    done = command("bench", "variants", run_file(), "--rounds", "1", "--steps", "1", "--json")
    assert json.loads(done.out)["variants"] == 4
    refused = command("bench", "variants", run_file(training__tokens=0))
    assert refused.code == 2
    refused.says("training.tokens", "no step to time")
