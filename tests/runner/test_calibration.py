"""What training follows only on average is set at the end of training, and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit import SparseAutoencoder
from saekit.builtin.architectures.batchtopk import BatchTopK
from saekit.sae.formats import open_sae
from saekit.testing import tiny_run
from saekit.testing.tiny import tiny_table

K = 8


def short_run(directory: Path, use: str, **training: Any) -> Any:
    table = tiny_table()
    table["architecture"] |= {"use": use, "k": K}
    table["source"] |= {"held_out": 4000}
    table["training"] |= {"tokens": 60 * 64, "batch_size": 64, "lr": 1e-2, **training}
    table["evaluation"] = {"tokens": 4000, "batch_size": 500}
    if use == "matryoshka":
        table["loss"] = [{"use": "matryoshka"}]
    return tiny_run(directory, **table)


@pytest.mark.parametrize("use", ["batchtopk", "matryoshka"])
def test_held_out_l0_is_k_after_a_short_run(use: str, tmp_path: Path) -> None:
    run = short_run(tmp_path / "run", use)
    assert run.summary["metrics"]["l0"] == pytest.approx(K, rel=0.03)
    told = run.summary["sae"]["calibrated"]
    assert told["tokens"] > 0
    saved = open_sae(run.directory / "sae")
    assert saved.metadata["calibrated"] == told
    assert float(saved.sae.threshold) == pytest.approx(told["threshold"])
    assert json.loads((run.directory / "summary.json").read_text())["sae"]["calibrated"] == told


def test_an_architecture_with_nothing_to_calibrate_says_nothing(tmp_path: Path) -> None:
    run = short_run(tmp_path / "run", "topk")
    assert run.summary["sae"]["calibrated"] == {}
    assert "calibrated" not in open_sae(run.directory / "sae").metadata


@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_the_threshold_leaves_k_active_however_the_sample_is_cut(pieces: int) -> None:
    draws = torch.Generator().manual_seed(0)
    sae, x = BatchTopK(16, 64, k=K), torch.randn(400, 16, generator=draws)
    sae.initialise(draws, x)
    found = sae.calibrate(iter(x.chunk(pieces)))
    assert int(sae.eval().encode(x).count().sum()) == K * len(x)
    assert found == {"threshold": float(sae.threshold)}


def test_with_fewer_positive_than_k_all_of_them_are_active() -> None:
    draws = torch.Generator().manual_seed(0)
    sae, x = BatchTopK(16, 64, k=60), torch.randn(50, 16, generator=draws)
    sae.initialise(draws, x)
    assert sae.calibrate(iter([x])) == {"threshold": 0.0}
    assert SparseAutoencoder.calibrate(sae, iter([x])) == {}
