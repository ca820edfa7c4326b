"""The run file that docs/transcoders.md shows, smaller: an MLP of the model organism against the best linear map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import saekit

pytestmark = pytest.mark.slow

RUN_FILE = Path(__file__).parents[2] / "docs" / "examples" / "transcoder.toml"


def test_latents_rebuild_what_no_linear_map_does(tmp_path: Path) -> None:
    """At an L0 of 16, with the linear path or without; an untrained transcoder is worse than the mean."""
    settings = {
        "source.kinds": ["prose"],  # of which little is held out, so that the cache is soon written
        "source.cache": str(tmp_path / "cache"),
        "source.cache_tokens": 100_000,
        "architecture.d_sae": 512,
        "architecture.k": 16,
        "metric": [],
        "training.tokens": 300_000,
        "training.buffer": 16_384,
        "training.threads": 1,
        "evaluation.tokens": 20_000,
    }
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "skip": {"architecture.skip": True},
        "untrained": {"training.tokens": 2048, "training.lr": 1e-9},
    }
    found = {
        name: saekit.run(RUN_FILE, overrides=settings | change, directory=tmp_path / name).summary["metrics"]
        for name, change in changes.items()
    }
    explained = {name: metrics["explained_variance"] for name, metrics in found.items()}
    linear = found["plain"]["linear_explained_variance"]
    assert 0.3 < linear < 0.6
    assert found["skip"]["linear_explained_variance"] == linear
    assert explained["untrained"] < 0
    for name in ("plain", "skip"):
        assert found[name]["l0"] <= 16
        assert explained[name] > linear + 0.08
        assert found[name]["beyond_linear"] > 0.15
    assert explained["skip"] > explained["plain"]  # with few latents, the path takes work off them
    saved = saekit.load_sae(tmp_path / "skip" / "sae")
    assert saved.transcoder and not saved.reads_centred and saved.W_skip is not None
