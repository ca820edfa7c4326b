"""Every architecture x every source x every loss of the core, in runs of a few steps on a few narrow activations.

The lists come from the registry, so a new component joins by itself; only a new source must say here what it reads.
What goes together is asked of the plan, and held against what the components declare in `needs` and `provides`.

Run: each architecture on each source with all the losses that it can have at once, so every allowed triple is trained;
and on `synthetic` with each of them alone, beside `mse`. Only planned, or refused: every triple, one by one.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from encoders import text_model
from helpers import NARROW_MODULE, logged

import saekit
from saekit.component import Component
from saekit.errors import UsageError
from saekit.plugins import Registry
from saekit.registered import OWN_DISTRIBUTION
from saekit.run_file import parse_config
from saekit.runner.plan import ALWAYS_PROVIDED, make_plan
from saekit.testing.fixtures import few_active

REGISTRY = Registry()
STEPS, BATCH, D_SAE = 6, 64, 48


def of_core(kind: str) -> list[Any]:
    """The core's components of a kind as parameters of a test."""
    found = [c for c in REGISTRY.components(kind) if c.distribution == OWN_DISTRIBUTION]
    return [pytest.param(c, id=c.name) for c in found]


def lacks(provided: set[str], architecture: Component, loss: Component) -> set[str]:
    """What a loss needs and has neither from the source nor from the architecture, as they declare it. No loss of the
    core provides what another one needs."""
    return set(loss.needs) - {*provided, *architecture.provides, *ALWAYS_PROVIDED}


ARCHITECTURES, LOSSES = of_core("architecture"), of_core("loss")
SOURCES = [source for source in of_core("source") if source.id != "pushed"]  # which no run file can read: see test_online.py
SYNTHETIC = REGISTRY.find("source", "synthetic")
PAIRS = [
    pytest.param(architecture, loss, id=f"{architecture.name}-{loss.name}")
    for (architecture,), (loss,) in itertools.product([p.values for p in ARCHITECTURES], [p.values for p in LOSSES])
    if not lacks(set(SYNTHETIC.provides), architecture, loss)
]


@pytest.fixture(scope="module")
def reads(tiny_gpt2: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The options with which each source gives a few narrow activations."""
    place = tmp_path_factory.mktemp("crosses")
    (place / "module.py").write_text(NARROW_MODULE, encoding="utf-8")
    np.save(place / "x.npy", np.random.default_rng(0).standard_normal((1000, 16), dtype=np.float32))
    texts = text_file.read_text(encoding="utf-8").split("\n\n")
    lines = [json.dumps({"text": text, "odd": number % 2}) for number, text in enumerate(texts)]
    (place / "labelled.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pairs = [f"the {age} {what}" for age in ("red", "blue", "old", "new") for what in ("ship", "house", "sails", "stands")] * 8
    short = [json.dumps({"text": text, "odd": number % 2}) for number, text in enumerate(pairs)]
    (place / "short.jsonl").write_text("\n".join(short), encoding="utf-8")
    model = {"model": str(tiny_gpt2), "hook_point": "blocks.1.hook_out", "context": 32, "held_out": 0.2}
    return {
        "labelled": {**model, "data": str(place / "labelled.jsonl"), "labels": ["odd"]},
        "module": {
            "module": f"{place / 'module.py'}:narrow",
            "data": f"{place / 'module.py'}:batches",
            "hook_point": ".",
        },
        "encoder": {
            "model": text_model(place / "bert", "bert"),
            "data": str(place / "short.jsonl"),
            "labels": ["odd"],
            "hook_point": "encoder.layer.1.intermediate.dense",
            "context": 12,
            "held_out": 0.2,
        },
        "organism": {"kinds": ["facts"], "context": 32},
        "synthetic": {"d_in": 16, "n_features": 32, "probability": 0.1, "held_out": 200, "concepts": [0, 1]},
        "tensors": {"data": str(place / "x.npy"), "chunk": 100},
        "text": {**model, "data": str(text_file)},
    }


@pytest.fixture(scope="module")
def table(reads: dict[str, dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Makes the run file of a source, an architecture and some losses, `mse` among them."""

    def make(source: Component, architecture: Component, losses: list[Component]) -> dict[str, Any]:
        assert source.name in reads, f"say in the fixture `reads` what a tiny run of source {source.name!r} reads"
        few = few_active(architecture, 4)
        names = dict.fromkeys(["mse", *(loss.name for loss in losses)])
        return {
            "source": {"use": source.name, **reads[source.name]},
            "architecture": {"use": architecture.name, "d_sae": D_SAE, **few},
            "loss": [{"use": name, "weight": 1.0 if name == "mse" else 0.01} for name in names],
            "training": {
                "tokens": STEPS * BATCH,
                "batch_size": BATCH,
                "buffer": 512,
                "log_every": 1,
                "guard_steps": STEPS,
                "dead_after": BATCH,
                "device": "cpu",
            },
            "evaluation": {"tokens": 100},
        }

    return make


def provided_by(source: Component, table: dict[str, Any]) -> set[str]:
    """What a source of a run file declares, less what it withholds with these options."""
    options = {key: value for key, value in table["source"].items() if key != "use"}
    built = source.build(source.validate(options, "source"))
    return set(source.provides) - set(getattr(built, "withheld", {}))


def carried_out(table: dict[str, Any], directory: Path) -> saekit.FinishedRun:
    path = directory / "run.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return saekit.run(path, directory=directory / "run")


def holds(run: saekit.FinishedRun, architecture: Component, losses: list[Component]) -> None:
    """Every step's numbers are finite, every loss was computed, and the SAE can be loaded and used."""
    steps = logged(run.directory)
    assert len(steps) == STEPS
    assert [(row, key) for row in steps for key, value in row.items() if not math.isfinite(value)] == []
    assert {f"loss/{loss.name}" for loss in losses if not may_be_silent(loss)} <= {
        name for row in steps for name in row
    }
    sae = saekit.load_sae(run.directory / "sae")
    assert isinstance(sae, architecture.load())
    assert (sae.d_sae, sae.d_in) == (D_SAE, run.summary["sae"]["d_in"])
    assert torch.isfinite(sae(torch.randn(5, sae.d_in, generator=torch.Generator().manual_seed(0)))).all()


def may_be_silent(loss: Component) -> bool:
    """Whether it has steps without anything to say, as `auxk` while no latent is dead."""
    return hasattr(loss.load(), "active")


def test_each_kind_is_found() -> None:
    """Otherwise nothing below would be tested."""
    assert all((ARCHITECTURES, SOURCES, LOSSES, PAIRS))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_on_a_source_with_all_its_losses(
    architecture: Component, source: Component, table: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    provided = provided_by(source, table(source, architecture, []))
    losses = [p.values[0] for p in LOSSES if not lacks(provided, architecture, p.values[0])]
    run = carried_out(table(source, architecture, losses), tmp_path)
    holds(run, architecture, losses)
    assert run.summary["warnings"] == [], "every parameter and every loss takes part"


@pytest.mark.parametrize(("architecture", "loss"), PAIRS)
def test_an_architecture_with_a_loss(
    architecture: Component, loss: Component, table: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Beside `mse`. A parameter that this loss does not move is told of; a loss that moves nothing would be a bug."""
    run = carried_out(table(SYNTHETIC, architecture, [loss]), tmp_path)
    holds(run, architecture, [loss])
    assert [warning for warning in run.summary["warnings"] if not warning.startswith("No gradient has reached")] == []


def test_every_triple_is_planned_or_refused(
    table: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is refused is refused before anything is opened, by a message that names the loss, its key and the need."""
    for parameter in SOURCES:
        monkeypatch.setattr(parameter.values[0].load(), "open", None)  # to call it would be a TypeError
    refused = 0
    for parameters in itertools.product(SOURCES, ARCHITECTURES, LOSSES):
        source, architecture, loss = (p.values[0] for p in parameters)
        given = table(source, architecture, [loss])
        missing = lacks(provided_by(source, given), architecture, loss)
        if not missing:
            plan = make_plan(parse_config(given, "run.toml"), REGISTRY)
            assert (plan.source.component, plan.architecture.component) == (source, architecture)
            assert loss in [part.component for part in plan.sections["loss"]]
            continue
        with pytest.raises(UsageError, match=rf"^loss\.{loss.name}: .* needs '({'|'.join(missing)})', which "):
            carried_out(given, tmp_path)
        assert not (tmp_path / "run").exists()
        refused += 1
    assert refused
