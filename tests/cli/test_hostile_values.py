"""Values that no format forbids and nobody means are a user's errors: each is one message, with the file or the key."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from fuzz.valid import ACTIVATIONS, activations, run_table
from helpers import Outcome
from safetensors.torch import save_file

Run = Callable[..., Outcome]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a run file and its activations."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ACTIVATIONS).write_bytes(activations())
    (tmp_path / "run.toml").write_text(tomli_w.dumps(run_table()), encoding="utf-8")
    return tmp_path


def refused(outcome: Outcome, *words: str, code: int = 2) -> None:
    assert outcome.code == code and "bug" not in outcome.err, outcome.err
    outcome.says("error: ", *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.threads=100000", ("training.threads", "1024")),
        ("source.held_out=nan", ("source.held_out", "nan is not a finite number")),
        ("architecture.k=nan", ("architecture.k", "nan is not a finite number")),
        (f"architecture.k={10**30}", ("architecture.k", "64 bits")),
        (f"training.tokens={10**400}", ("training.tokens", "64 bits")),
        (f"training.tokens=0x{'f' * 6000}", ("training.tokens",)),
        (f"training.lr={'[' * 5000}", ("training.lr",)),
        (f"evaluation.batch_size={2**63}", ("evaluation.batch_size", "64 bits")),
    ],
    ids=lambda given: given[:40] if isinstance(given, str) else "",
)
def test_numbers(change: str, words: tuple[str, ...], command: Run, place: Path) -> None:
    refused(command("run", "run.toml", "--dry-run", "-o", change), *words)


def test_an_sae_beyond_all_memory(command: Run, place: Path) -> None:
    refused(
        command("run", "run.toml", "--directory", "run", "-o", f"architecture.d_sae={2**62}"),
        "not enough memory",
        code=1,
    )


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 20_000, "a." * 20_000 + "b = 1", f"a = {'9' * 5000}"], ids=["lists", "keys", "digits"]
)
def test_a_run_file_that_python_cannot_read(text: str, command: Run, place: Path) -> None:
    (place / "deep.toml").write_text(text, encoding="utf-8")
    refused(command("run", "deep.toml"), "deep.toml")


def test_a_name_that_is_too_long_for_a_file(command: Run, place: Path) -> None:
    refused(command("run", "x" * 5000), "File name too long")
    refused(command("run", "run.toml", "--dry-run", "-o", f'source.data="{"x" * 5000}"'), "File name too long")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="whoever may read everything")
def test_a_plugin_file_that_may_not_be_read(command: Run, place: Path) -> None:
    (place / "mine.py").touch(mode=0)
    refused(command("plugins", "--plugin", "mine.py"), "mine.py", "Permission denied")


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", ""], ["compare", ""], ["run", "run.toml", "--directory", ""], ["run", "--resume", ""],
        ["export", "--to", "sae_lens", "", "new"], ["export", "--to", "sae_lens", "sae", ""],
        ["import", "", "new"], ["import", "sae", ""],
    ],
    ids=" ".join,
)  # fmt: skip
def test_an_empty_path_is_not_the_working_directory(arguments: list[str], command: Run, place: Path) -> None:
    """Even where that is a run, or empty."""
    written(place, weights())
    here = {path.name: path.stat().st_mtime_ns for path in [place, *place.iterdir()]}
    refused(command(*arguments), "the path is empty")
    assert {path.name: path.stat().st_mtime_ns for path in [place, *place.iterdir()]} == here


def test_a_report_is_asked_of_no_run(command: Run, place: Path) -> None:
    (place / "other").mkdir()
    before = (place / "other").stat().st_mtime_ns
    refused(command("report", "other"), "not a run directory")
    assert (place / "other").stat().st_mtime_ns == before  # not even a lock was there


@pytest.mark.parametrize("headline", [[["l0"], {}, 3, "l0"], {"l0": 1}, "l0", [None]], ids=str)
def test_a_summary_whose_names_are_none(headline: Any, command: Run, place: Path) -> None:
    (place / "run").mkdir()
    (place / "run" / "run.toml").write_bytes((place / "run.toml").read_bytes())
    summary = {"metrics": {"l0": 3.0, "mse": 1.0}, "headline": headline, "variants": {"a": {"headline": headline}}}
    (place / "run" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    for arguments in (["report"], ["compare"], ["run", "--resume"]):
        outcome = command(*arguments, "run")
        assert outcome.code == 0, outcome.err
    assert (place / "run" / "report.html").is_file()


# --- SAEs of others ----------------------------------------------------------------------------------------------


CFG = {
    "architecture": "topk",
    "d_in": 4,
    "d_sae": 8,
    "k": 2,
    "normalize_activations": "none",
    "metadata": {"sae_lens_version": "6.0.0"},
}


def weights(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "W_enc": torch.ones(4, 8),
        "b_enc": torch.ones(8),
        "W_dec": torch.ones(8, 4),
        "b_dec": torch.ones(4),
        **changes,
    }


def written(place: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    (place / "sae").mkdir()
    (place / "sae" / "cfg.json").write_text(json.dumps(CFG | changes), encoding="utf-8")
    save_file(tensors, place / "sae" / "sae_weights.safetensors")


@pytest.mark.parametrize(
    ("tensors", "word"),
    [(weights(W_enc=torch.ones(4, 8, dtype=torch.complex64)), "complex"), (weights(b_enc=torch.ones(0)), "empty")],
    ids=["complex", "empty"],
)
def test_tensors_that_are_no_weights(tensors: dict[str, torch.Tensor], word: str, command: Run, place: Path) -> None:
    written(place, tensors)
    refused(command("import", "sae", "new"), "sae_weights.safetensors", word, "float32")


@pytest.mark.parametrize(
    "change",
    [{"architecture": 3}, {"architecture": ["topk"]}, {"d_out": 2**40}, {"metadata": {"sae_lens_version": "9" * 5000}}],
    ids=str,
)
def test_a_configuration_of_odd_types(change: dict[str, Any], command: Run, place: Path) -> None:
    written(place, weights(), **change)
    outcome = command("import", "sae", "new")
    assert "bug" not in outcome.err
    assert outcome.code == (0 if "metadata" in change else 2), outcome.err


@pytest.mark.parametrize("kind", ["sparse", "quantised", "complex", "code"])
def test_a_state_dict_of_dictionary_learning(kind: str, command: Run, place: Path) -> None:
    """torch's own message for more than tensors says how to unpickle it all the same; saekit's does not."""
    dense = torch.ones(8, 4)
    odd: dict[str, Any] = {
        "sparse": dense.to_sparse(),
        "quantised": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        "complex": dense.to(torch.complex64),
        "code": Path("x"),
    }
    state = {
        "encoder.weight": odd[kind],
        "encoder.bias": torch.ones(8),
        "decoder.weight": torch.ones(4, 8),
        "bias": torch.ones(4),
    }
    (place / "sae").mkdir()
    torch.save(state, place / "sae" / "ae.pt")
    (place / "sae" / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}', encoding="utf-8")
    outcome = command("import", "sae", "new")
    refused(outcome, "ae.pt", "more than tensors" if kind == "code" else kind)
    assert "weights_only" not in outcome.err and "trust" not in outcome.err
