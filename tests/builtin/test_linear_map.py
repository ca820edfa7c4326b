"""The linear map against torch's own least squares, and what transcoder runs make of linear and other targets."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch
from helpers import WEIGHTS, weights
from safetensors.torch import load_file, save_file

import saekit
from saekit import Activations, Step
from saekit.api import resume
from saekit.builtin.linear_map import LinearMap, NormalEquations
from saekit.builtin.sources import TensorsSource
from saekit.config import TrainingConfig
from saekit.errors import UsageError
from saekit.runner.context import RunContext
from saekit.sae.code import DenseCode

D_IN, D_OUT, ROWS = 12, 20, 6000


def drawn(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(x [ROWS, D_IN], target [ROWS, D_OUT]), both far from the origin, the target fifty times larger."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, D_IN, generator=generator) + 3.0
    matrix = torch.randn(D_IN, D_OUT, generator=generator)
    if kind == "linear":
        return x, 50.0 * (x @ matrix) + 100.0
    # Half of the variance, about, is a sum of kinks, which a linear map can follow in part only.
    kinks = (x @ torch.randn(D_IN, 30, generator=generator) / D_IN**0.5 - 2.0).abs()
    return x, 50.0 * (0.3 * x @ matrix + kinks @ torch.randn(30, D_OUT, generator=generator)) + 100.0


@pytest.mark.parametrize("degenerate", [False, True])
def test_the_fit_is_that_of_least_squares(degenerate: bool) -> None:
    x, target = drawn("kinks")
    if degenerate:  # as what a LayerNorm gives: its coordinates sum to zero
        x = x - x.mean(1, keepdim=True)
    fit = NormalEquations()
    for start in range(0, ROWS, 777):
        fit.add(Activations(x[start : start + 777], target[start : start + 777]))
    found, bias = fit.solve()
    with_one = torch.cat([x, torch.ones(ROWS, 1)], 1).double()
    expected = with_one @ torch.linalg.lstsq(with_one, target.double(), driver="gelsd", rcond=1e-6).solution
    assert fit.rows == ROWS
    torch.testing.assert_close(x.double() @ found + bias, expected, rtol=1e-6, atol=1e-4)


def context(x: torch.Tensor, target: torch.Tensor, warned: list[str], **training: Any) -> RunContext:
    """A context that gives these rows to a run whose data have another seed (7) than its weights (5)."""

    def blocks(split: str, *, size: int, seed: int):
        assert (split, seed) == ("train", 7)
        while True:
            for start in range(0, len(x), size):
                yield Activations(x[start : start + size], target[start : start + size])

    settings = {"tokens": 10_000, "buffer": 500, "batch_size": 130, "seed": 5, "data_seed": 7, **training}
    config: Any = SimpleNamespace(training=TrainingConfig(**settings))
    source: Any = SimpleNamespace(blocks=blocks, d_in=x.shape[1])
    sae: Any = None
    return RunContext(sae, source, config, torch.device("cpu"), Path(), warned.append)


def measured(
    metric: LinearMap, x: torch.Tensor, target: torch.Tensor, rebuilt: torch.Tensor, *sizes: int
) -> dict[str, Any]:
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        metric.update(Step(x[rows], target[rows], DenseCode(x[rows]), rebuilt[rows], None))  # type: ignore[arg-type]
        start += size
    return metric.compute()


def test_its_values_against_their_definitions() -> None:
    x, target = drawn("kinks")
    warned: list[str] = []
    metric = LinearMap(tokens=4000)
    metric.prepare(context(x[:4000], target[:4000], warned))
    assert not warned
    held_x, held = x[4000:], target[4000:]
    rebuilt = held + torch.randn(held.shape, generator=torch.Generator().manual_seed(2)) * 20.0
    found = measured(metric, held_x, held, rebuilt, 700, 1, 1299)
    with_one = torch.cat([x, torch.ones(ROWS, 1)], 1).double()
    solution = torch.linalg.lstsq(with_one[:4000], target[:4000].double()).solution
    missed = (held - with_one[4000:] @ solution).square().sum()
    spread = (held.double() - held.double().mean(0)).square().sum()
    error = (held - rebuilt).double().square().sum()
    assert found["linear_explained_variance"] == pytest.approx(float(1 - missed / spread), abs=1e-6)
    assert found["beyond_linear"] == pytest.approx(float(1 - error / missed), abs=1e-6)
    assert set(found) == set(LinearMap.meanings)


def test_what_is_not_defined_is_none() -> None:
    x, target = drawn("linear")
    metric = LinearMap()
    metric.prepare(context(x, target, [], tokens=0))
    found = measured(metric, x, target, target, ROWS)
    assert found["linear_explained_variance"] == pytest.approx(1.0) and found["beyond_linear"] is None
    flat = torch.full((ROWS, 3), 2.0)
    metric = LinearMap()
    metric.prepare(context(x, flat, []))
    assert measured(metric, x, flat, flat, ROWS) == {"linear_explained_variance": None, "beyond_linear": None}


def test_a_fit_to_too_few_activations_is_told() -> None:
    x, target = drawn("kinks")
    warned: list[str] = []
    LinearMap(tokens=100).prepare(context(x, target, warned))
    assert len(warned) == 1 and "fitted to 100 activations of width 12" in warned[0]


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path: Path):
    """Writes a run file for stored pairs of activations. A change's key has `__` between its parts."""

    def write(kind: str, **changes: Any) -> Path:
        x, target = drawn(kind)
        save_file({"activations": x, "target": target}, tmp_path / f"{kind}.safetensors")
        table: dict[str, Any] = {
            "source": {
                "use": "tensors",
                "data": str(tmp_path / f"{kind}.safetensors"),
                "target": "target",
                "chunk": 50,
            },
            "architecture": {"use": "topk", "d_sae": 64, "k": 8},
            "loss": [{"use": "mse"}],
            "training": {
                "tokens": 120_000,
                "batch_size": 256,
                "buffer": 2048,
                "lr": {"schedule": "warmup_decay", "to": 1e-2, "decay": 0.5},
                "checkpoint_every": 100,
                "keep_checkpoints": 9,
                "device": "cpu",
            },
        }
        for key, value in changes.items():
            section, name = key.split("__")
            table[section] = {k: v for k, v in (table[section] | {name: value}).items() if v is not None}
        path = tmp_path / "run.toml"
        path.write_text(tomli_w.dumps(table), encoding="utf-8")
        return path

    return write


def pairs(run: Path, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The held-out pairs of the run's source."""
    source = TensorsSource(data=str(run.parent / f"{kind}.safetensors"), target="target", chunk=50)
    source.open(device=torch.device("cpu"), dtype=torch.float32)
    blocks = list(source.blocks("held_out", size=10**6, seed=0))
    return torch.cat([b.x for b in blocks]), torch.cat([b.target for b in blocks])


def test_a_linear_target_needs_the_linear_path(run_file, tmp_path: Path) -> None:
    """With it, training finds the map that least squares finds; every transcoder run has the control without asking."""
    found = {}
    for skip in (False, True):
        run = saekit.run(run_file("linear", architecture__skip=skip), directory=tmp_path / f"skip {skip}")
        metrics = found[skip] = run.summary["metrics"]
        assert metrics["linear_explained_variance"] == pytest.approx(1.0, abs=1e-6)
        assert "linear_explained_variance" in run.summary["headline"]
    assert found[True]["explained_variance"] > 0.999
    assert found[False]["explained_variance"] < found[True]["explained_variance"] - 0.02


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_saved_rebuilds_raw_activations(skip: bool, normalize: bool, run_file, tmp_path: Path) -> None:
    """The input's norm is about 11 and the target's about 700: each is scaled by its own factor, and both are folded."""
    (tmp_path / "norms.py").write_text(
        """
from saekit import Component, hookimpl

def input_norm(step):
    "Mean norm of what the SAE reads."
    return step.x.norm(dim=1).mean() + 0.0 * step.reconstruction.sum()

def target_norm(step):
    "Mean norm of what it is to rebuild."
    return step.target.norm(dim=1).mean() + 0.0 * step.reconstruction.sum()

@hookimpl
def saekit_losses():
    yield Component("input_norm", input_norm)
    yield Component("target_norm", target_norm)
"""
    )
    settings = {"training__normalize": normalize, "training__tokens": 30_000}
    file = run_file("kinks", architecture__skip=skip, **settings)
    losses = {"loss": [{"use": "mse"}, {"use": "input_norm"}, {"use": "target_norm"}]}
    run = saekit.run(file, overrides=losses, plugins=[tmp_path / "norms.py"], directory=tmp_path / "run")
    x, target = pairs(run.directory, "kinks")
    trained = run.summary["losses"]
    for loss, raw, width in (("input_norm", x, D_IN), ("target_norm", target, D_OUT)):
        wanted = width**0.5 if normalize else float(raw.norm(dim=1).mean())
        assert trained[loss] == pytest.approx(wanted, rel=0.05)
    sae = saekit.load_sae(run.directory / "sae")
    assert (sae.d_in, sae.d_out, sae.transcoder, sae.reads_centred) == (D_IN, D_OUT, True, False)
    error = (target - sae(x)).double().square().sum()
    explained = float(1 - error / (target.double() - target.double().mean(0)).square().sum())
    assert run.summary["metrics"]["explained_variance"] == pytest.approx(explained, abs=1e-5)
    if normalize:
        last = load_file(max((run.directory / "checkpoints").glob("step-*")) / "tensors.safetensors")
        scales = D_IN**0.5 / float(x.norm(dim=1).mean()), D_OUT**0.5 / float(target.norm(dim=1).mean())
        torch.testing.assert_close(last["sae.W_dec"], sae.W_dec)
        torch.testing.assert_close(last["sae.W_enc"] * scales[0] / scales[1], sae.W_enc, rtol=0.05, atol=1e-3)
        assert explained > 0.5


def test_a_transcoder_resumes_to_the_same_bits(run_file, tmp_path: Path) -> None:
    """Both scales are in the checkpoint."""
    file = run_file("kinks", architecture__skip=True, training__tokens=300 * 256)
    whole = saekit.run(file, directory=tmp_path / "whole").directory
    kept = weights(whole)
    newest = max((whole / "checkpoints").glob("step-*"))
    kept_scales = json.loads((newest / "state.json").read_text())["trainer"]
    assert kept_scales["scale"] > 10 * kept_scales["target_scale"]
    for path in [*newest.iterdir(), whole / "summary.json", whole / WEIGHTS]:
        path.unlink()
    newest.rmdir()
    assert weights(resume(str(whole)).directory) == kept


def test_a_transcoder_trains_on_from_a_directory(run_file, tmp_path: Path) -> None:
    """What was folded is unfolded: nearly nothing learned leaves it as it was."""
    first = saekit.run(run_file("kinks", architecture__skip=True), directory=tmp_path / "first").directory
    start = {"architecture__from": str(first / "sae"), "architecture__d_sae": None, "architecture__k": None}
    file = run_file("kinks", **start, training__lr=1e-9, training__tokens=512)
    again = saekit.run(file, directory=tmp_path / "again").directory
    before, after = (saekit.load_sae(run / "sae") for run in (first, again))
    for key, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)


def test_a_linear_path_without_another_site_is_refused_before_anything_is_loaded(run_file, tmp_path: Path) -> None:
    file = run_file("kinks", architecture__skip=True, source__target=None)
    with pytest.raises(UsageError, match=r"architecture.skip: .*identity.* name the tensor .* in source.target"):
        saekit.run(file, directory=tmp_path / "run")
    organism = {"architecture.skip": True}
    with pytest.raises(UsageError, match=r"architecture.skip: .*identity.* set source.target_hook_point"):
        saekit.run("quickstart", overrides=organism, directory=tmp_path / "run")
    with pytest.raises(UsageError, match=r"metric 'linear_map' needs 'target'.* source.target"):
        saekit.run(run_file("kinks", source__target=None), overrides={"metric": [{"use": "linear_map"}]})
    assert not (tmp_path / "run").exists()


def test_starting_from_an_sae_of_the_other_kind_is_refused(run_file, tmp_path: Path) -> None:
    x = torch.randn(2000, D_IN)
    save_file({"activations": x, "target": x.flip(1)}, tmp_path / "square.safetensors")
    short = {"source__data": str(tmp_path / "square.safetensors"), "training__tokens": 512}
    made = {}
    for name, changes in {"sae": {"source__target": None}, "transcoder": {"architecture__skip": True}}.items():
        made[name] = saekit.run(run_file("kinks", **short, **changes), directory=tmp_path / name).directory / "sae"
    for name, changes, words in (
        ("sae", {}, "takes b_dec from its input: it rebuilds what it reads, but the source asks for another site"),
        (
            "transcoder",
            {"source__target": None},
            r"has a linear path \(skip\), but the source asks it to rebuild what it reads",
        ),
        ("transcoder", {"architecture__skip": False}, "architecture.skip: False, but the SAE in .* was made with True"),
    ):
        start = {"architecture__from": str(made[name]), "architecture__d_sae": None, "architecture__k": None}
        with pytest.raises(UsageError, match=words):
            saekit.run(run_file("kinks", **short, **start, **changes), directory=tmp_path / "refused")
