"""The analyzer `intervene` on a planted module: a latent that is ablated moves the output that it should by what it should."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import saekit
from saekit import ComponentError, OptionError, RunContext, UsageError
from saekit.builtin.architectures.standard import Standard
from saekit.builtin.intervene import Intervene
from saekit.builtin.intervene.means import ClusteredMeans
from saekit.builtin.sources import ModuleSource
from saekit.config import EvaluationConfig, TrainingConfig
from saekit.seeds import derived_seed

CPU = torch.device("cpu")
D, FEATURES, CLASSES = 40, 30, ["red", "green", "blue"]
DIRECTIONS = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0][:FEATURES]
HEAD = torch.zeros(len(CLASSES), FEATURES, dtype=torch.float64)
HEAD[0, 0], HEAD[1, 1], HEAD[2, 2] = 2.0, 3.0, -1.5  # features 0 to 2 are read by one class each, the others by none
HEAD[:, 3:] = 0.01 * torch.randn(3, FEATURES - 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
REST = DIRECTIONS.mean(0)  # what the SAE does not rebuild: a constant part


@dataclasses.dataclass
class Output:
    scores: torch.Tensor
    extra: str = "x"


class Planted(nn.Module):
    """Features [n, F] or [n, T, F] -> their sum at `site` -> a linear head on the planted directions."""

    def __init__(self, form: str = "tensor", inside: bool = False):
        super().__init__()
        self.site, self.head = nn.Identity(), nn.Linear(D, len(CLASSES), dtype=torch.float64)
        self.before, self.form, self.inside = nn.Identity(), form, inside
        self.head.weight.data, self.head.bias.data = HEAD @ DIRECTIONS, torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)

    def forward(self, features, mask=None):
        x = self.before(features @ DIRECTIONS + REST)
        if self.inside:  # masked mean pooling
            x = (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        y = self.head(self.site(x))
        return {"tensor": y, "dict": {"scores": y, "n": len(y)}, "dataclass": Output(y), "one": y[:, 0], "none": None}[self.form]


def draws(n, generator, length=None):
    shape = (n, FEATURES) if length is None else (n, length, FEATURES)
    on = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.3
    return on * (0.5 + torch.rand(shape, generator=generator, dtype=torch.float64))


def flat(size=37):
    def data(split, seed):
        generator = torch.Generator().manual_seed(seed % 1000 + 7)
        everything = draws(400, generator)
        for some in everything.split(size):
            yield {"features": some, "kind": (some[:, :3] > 0).double()}

    return data


def sets(split, seed):
    generator = torch.Generator().manual_seed(seed % 1000 + 3)
    for _ in range(12):
        features = draws(30, generator, 4)
        mask = torch.arange(4) < torch.randint(1, 5, (30, 1), generator=generator)
        label = ((features[:, :, :3] > 0) & mask[:, :, None]).any(1).double()
        yield {"features": features, "mask": mask.double(), "kind": label}


def context(source=None, sae=None, **options):
    """An SAE whose latent j reads feature j exactly, on a source."""
    if source is None:
        options = {"module": Planted, "data": flat(), "hook_point": "site", "args": ["features"], "labels": "kind"} | options
        source = ModuleSource(**({"concepts": CLASSES, "output_names": CLASSES} | options))
    source.open(device=CPU, dtype=torch.float64)
    if sae is None:
        sae = Standard(D, FEATURES, decoder_norm="free").to(torch.float64).requires_grad_(False)
        sae.W_dec.copy_(DIRECTIONS)
        sae.W_enc.copy_(DIRECTIONS.T)
        sae.b_enc.copy_(-DIRECTIONS @ REST - 1e-12)  # what is rounded away does not fire
        sae.b_dec.zero_()
    config = SimpleNamespace(training=TrainingConfig(batch_size=128, buffer=512), evaluation=EvaluationConfig())
    return RunContext(sae, source, config, CPU, Path(), lambda message: None)


def table(result, mode="error kept", rows="with"):
    found = [row for row in result.tables["effects"] if row["mode"] == mode and row["rows"] == rows]
    return {(row["concept"], row["output"]): row for row in found}


def held_out():
    return torch.cat([batch["features"] for batch in flat()("held_out", derived_seed("held out"))])


@pytest.mark.parametrize("size", [37, 400, 11])
def test_ablation_moves_the_class_by_the_closed_form_and_no_other(size):
    result = Intervene(controls=8)(context(data=flat(size)))
    features, found = held_out(), table(result)
    for j, concept in enumerate(CLASSES):
        own = features[features[:, j] > 0]
        for i, output in enumerate(CLASSES):
            row = found[concept, output]
            assert row["latent"] == j and row["n"] == len(own) and row["target"] == (i == j)
            assert row["change"] == pytest.approx(-float(HEAD[i, j]) * float(own[:, j].mean()), abs=1e-10)
            assert row["after"] == pytest.approx(row["before"] + row["change"], abs=1e-10)
            before = own @ HEAD[i] + (HEAD @ DIRECTIONS @ REST)[i] + [0.1, -0.2, 0.3][i]
            assert row["before"] == pytest.approx(float(before.mean()), abs=1e-10)
            assert abs(row["control_low"]) < 0.02 and abs(row["control_high"]) < 0.02  # others hardly touch any class
        off = table(result, rows="without")[concept, concept]
        assert off["change"] == 0.0 and off["n"] == len(features) - len(own)  # the latent is silent there
    assert result.scalars["kept_moved"] == 2 and result.scalars["kept_moved_others"] == 0  # blue's feature speaks against it
    assert any("latent 2 (blue" in note and "does not fall below its controls" in note for note in result.notes)


def test_the_splice_is_reported_apart_and_its_own_change_beside_it():
    result = Intervene(controls=2)(context())
    kept, spliced = table(result), table(result, "spliced")
    lost = -(HEAD @ DIRECTIONS @ REST)  # the constant part is what the splice loses
    for key, row in spliced.items():
        i = CLASSES.index(key[1])
        assert row["splice"] == pytest.approx(float(lost[i]), abs=1e-10) and kept[key]["splice"] is None
        assert row["before"] == pytest.approx(kept[key]["before"] + float(lost[i]), abs=1e-10)
        assert row["change"] == pytest.approx(kept[key]["change"], abs=1e-10)  # of an edit, in a linear head
    alone = Intervene(controls=2, error="spliced")(context())
    assert {row["mode"] for row in alone.tables["effects"]} == {"spliced"} and "kept_moved" not in alone.scalars
    assert table(alone, "spliced") == spliced
