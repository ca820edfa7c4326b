"""A run on a local Hugging Face directory goes through every phase, and sae_lens opens what it leaves behind."""

from pathlib import Path

import pytest
import torch

import saekit
from saekit.hookspecs import hookimpl


class Phases:
    """A listener that remembers which phases ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    @hookimpl
    def phase_ended(self, phase: str) -> None:
        self.ended.append(phase)


def run_file(directory: Path, model: Path, text: Path, architecture: str) -> Path:
    """A run of 40 steps with everything that the core has to offer a language model."""
    sparsity = "k = 4" if architecture == "topk" else ""
    path = directory / "run.toml"
    path.write_text(
        f"""
[source]
use = "text"
model = "{model}"
data = "{text}"
hook_point = "blocks.1.hook_out"
context = 32
held_out = 0.2

[architecture]
use = "{architecture}"
d_sae = 128
{sparsity}

[[loss]]
use = "mse"

[[loss]]
use = "{'auxk' if architecture == 'topk' else 'l1'}"
weight = 1e-3

[[metric]]
use = "ce_recovered"
tokens = 200

[[analyzer]]
use = "features"
n_latents = 4

[training]
tokens = 2560
batch_size = 64
lr = 3e-3
buffer = 512
dead_after = 640

[evaluation]
tokens = 200
""",
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize("architecture", ["topk", "standard"])
@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_llama", "tiny_gemma2"])
def test_every_phase_of_a_run_on_any_model(
    model: str, architecture: str, tmp_path: Path, text_file: Path, request: pytest.FixtureRequest
) -> None:
    phases = Phases()
    path = run_file(tmp_path, request.getfixturevalue(model), text_file, architecture)
    run = saekit.run(path, directory=tmp_path / "run", view=phases)
    assert phases.ended == ["prepare", "train", "evaluate", "analyse", "report"]
    metrics = run.summary["metrics"]
    assert 0.1 < metrics["explained_variance"] <= 1.0  # it has learned something: an untrained one is below zero
    assert metrics["explained_variance"] == pytest.approx(1 - metrics["fvu"])
    if architecture == "topk":
        assert metrics["l0"] <= 4
    assert metrics["ce_clean"] > 0
    assert run.summary["analysis"]["features"]["latents"] == 128
    for name in ("run.toml", "provenance.json", "metrics.jsonl", "summary.json", "report.html", "sae/cfg.json"):
        assert (run.directory / name).is_file()
    sae = saekit.load_sae(run.directory / "sae")
    assert (sae.d_in, sae.d_sae) == (32, 128)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_sae_lens_opens_a_finished_run(architecture: str, tmp_path: Path, tiny_gpt2: Path, text_file: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    run = saekit.run(run_file(tmp_path, tiny_gpt2, text_file, architecture), directory=tmp_path / "run")
    ours = saekit.load_sae(run.directory / "sae")
    theirs = sae_lens.SAE.load_from_disk(str(run.directory / "sae"))
    x = torch.randn(300, 32)
    code = ours.encode(x)
    torch.testing.assert_close(theirs.encode(x), code.dense(), atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs(x), ours.decode(code), atol=1e-5, rtol=0)
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_out"
