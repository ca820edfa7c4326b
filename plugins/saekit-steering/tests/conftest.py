"""A finished tiny run, with a known direction in decoder row 0 and prompts that fit its context of 32 bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit import FeatureGraph, RunContext
from saekit.testing import tiny_language_run

PROMPTS = {
    "questions": ["How to sort?"],
    "neutral": ["It was a", "The lamp"],
    "unrelated": ["Salt and"],
}
"""Bytes are tokens here, and the model takes 32."""
FEW: dict[str, Any] = {
    "strengths": [0.5, 1.0],
    "controls": 2,
    "continued": 1,
    "max_new_tokens": 4,
    "set_size": 5,
    "min_count": 1,
    "set_sequences": 16,
    "held_out_tokens": 40,
    "pages": False,
}


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps(PROMPTS), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """Standard gating, so that a latent responds in proportion to what is added."""
    run = tiny_language_run(
        tmp_path_factory.mktemp("runs") / "run",
        architecture={"use": "standard", "d_sae": 24},
        loss=[{"use": "mse"}, {"use": "l1", "weight": 0.01}],
    )
    context = run.context
    with torch.no_grad():
        row = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(3)), dim=0)
        context.sae.W_dec[0], context.sae.W_enc[:, 0] = row, row
        context.sae.b_enc[0] = 5.0  # active everywhere, so that f rises by what is added
    return context


@pytest.fixture
def context(finished: RunContext, tmp_path: Path) -> RunContext:
    """The run with a graph of four neighbours of latent 0, of which latent 3 weighs three times as much as latent 1."""
    edges = torch.tensor([[1, 2, 3, 4, 0], [0, 0, 0, 0, 1]])
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0])
    graph = FeatureGraph.of(finished.sae, edges, weight, "tests.by_hand")
    return dataclasses.replace(finished, directory=tmp_path, graph=graph)


@pytest.fixture
def steer(prompts: str) -> Callable[..., Any]:
    """A small `Steer`; the arguments change its options."""
    from saekit_steering.steer import Steer

    return lambda **options: Steer(**{**FEW, "prompts": prompts, **options})
