"""The analyzer `intervene` on a planted module: a latent that is ablated moves the output that it should by what it should."""

from __future__ import annotations

import dataclasses
import functools
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
from saekit.builtin.intervene import Intervene as Analyzer
from saekit.builtin.intervene.means import ClusteredMeans
from saekit.builtin.sources import ModuleSource
from saekit.config import EvaluationConfig, TrainingConfig
from saekit.seeds import derived_seed
from saekit.testing.tiny import language_source

CPU = torch.device("cpu")
Intervene = functools.partial(Analyzer, training_tokens=2000)
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


@pytest.mark.parametrize(
    ("options", "factor"),
    [({"edit": "scale", "value": 3.0}, 2.0), ({"edit": "scale", "value": 0.25}, -0.75), ({"edit": "scale", "value": -1.0}, -2.0)],
)
def test_scaling_moves_in_proportion(options, factor):
    own = held_out()[:, 0]
    row = table(Intervene(concepts=["red"], controls=2, error="kept", **options)(context()))["red", "red"]
    assert row["change"] == pytest.approx(factor * 2.0 * float(own[own > 0].mean()), abs=1e-9)


@pytest.mark.parametrize("unit", ["absolute", "max", "rms"])
def test_a_latent_is_set_everywhere_in_its_unit(unit):
    run = context()
    found = Intervene(latents=[0], controls=2, error="kept", edit="set", value=2.0, unit=unit)(run)
    trained = torch.cat([batch.x for batch in run.training_activations(2000)]) @ DIRECTIONS[0] - REST @ DIRECTIONS[0]
    active = trained[trained > 1e-9]
    size = {"absolute": 1.0, "max": active.max(), "rms": active.square().mean().sqrt()}[unit]
    own = held_out()[:, 0]
    for rows, there in {"all": own >= 0, "with": own > 0, "without": own == 0}.items():
        row = table(found, rows=rows)["red", "red"]  # the concept that it tells best
        assert row["change"] == pytest.approx(2.0 * (2.0 * float(size) - float(own[there].mean())), abs=1e-9)
    assert "exceeds its controls" in found.notes[0]  # a change upward


def test_a_probability_changes_as_the_softmax_does():
    row = table(Intervene(concepts=["green"], controls=1, error="kept", scale="softmax")(context()))["green", "green"]
    x = held_out()
    own = x[:, 1] > 0
    logits = x @ HEAD.T + HEAD @ DIRECTIONS @ REST + torch.tensor([0.1, -0.2, 0.3])
    without = logits - x[:, 1:2] * HEAD[:, 1]
    assert row["change"] == pytest.approx(float((without.softmax(1) - logits.softmax(1))[own, 1].mean()), abs=1e-8)


@pytest.mark.parametrize("how", ["inside", "mean", "first", "last", "none"])
def test_sets_pooled_by_the_module_by_the_source_or_not_at_all(how):
    """One output for each set, or for each position; whatever pools, an ablation takes away what the latent was."""
    source = ModuleSource(
        module=lambda: Planted(inside=how == "inside"), data=sets, hook_point="site", labels="kind", concepts=CLASSES,
        output_names=CLASSES, args=["features", "mask"], mask=None if how == "inside" else "mask",
        pool="none" if how == "inside" else how,
    )  # fmt: skip
    found = table(Intervene(concepts=["green"], controls=1, error="kept")(context(source)), rows="all")["green", "green"]
    changes, sequences = [], 0
    for batch in sets("held_out", derived_seed("held out")):
        mask, x = batch["mask"].bool(), batch["features"][:, :, 1]
        sequences += len(mask)
        there = mask.sum(1)
        if how == "none":
            changes.append(-3 * x[mask])  # each position is an output and a row
        elif how == "inside":
            changes.append(-3 * (x * mask).sum(1) / there)
        else:  # every position's output changes by what the set's row does, or only the one that is the row
            row = {"mean": (x * mask).sum(1) / there, "first": x[:, 0], "last": x[torch.arange(len(x)), there - 1]}[how]
            changes.append(torch.cat([-3 * row.repeat_interleave(there) if how == "mean" else -3 * row, row.new_zeros(0)]))
            if how != "mean":
                changes.append(row.new_zeros(int(mask.sum()) - len(row)))
    whole = torch.cat(changes)
    assert found["n"] == len(whole) and found["sequences"] == sequences
    assert found["change"] == pytest.approx(float(whole.mean()), abs=1e-9)


@pytest.mark.parametrize("form", ["dict", "dataclass"])
def test_an_option_names_the_item_of_the_outputs(form):
    source = {"module": lambda: Planted(form), "output": ".[scores]"}
    plain, found = (table(Intervene(concepts=["red"], controls=1, error="kept")(context(**one))) for one in ({}, source))
    assert plain == found


def test_one_number_for_each_row_is_an_output():
    source = {"module": lambda: Planted("one"), "output_names": ["price"]}
    result = Intervene(concepts=["red"], controls=3, error="kept", targets={"red": "price"})(context(**source))
    own = held_out()[:, 0]
    assert table(result)["red", "price"]["change"] == pytest.approx(-2.0 * float(own[own > 0].mean()), abs=1e-9)


def test_targets_that_are_several_and_those_that_nobody_named():
    run = context(output_names=None)
    told = Intervene(concepts=["red"], controls=4, error="kept", targets={"red": ["output 0", "output 1"]})(run)
    assert "mean change of output 0, output 1" in told.notes[0]
    silent = Intervene(concepts=["red"], controls=4, error="kept")(run)
    assert "size of the change of all outputs" in silent.notes[0] and "targets" in silent.notes[-1]
    assert silent.scalars["kept_moved"] == 1 and silent.scalars["kept_moved_others"] == 0


def test_a_hub_that_moves_everything_is_told_to_move_the_others():
    class Hub(Planted):
        def __init__(self):
            super().__init__()
            self.head.weight.data = self.head.weight + DIRECTIONS[:1].expand(3, -1) * 2  # feature 0 moves all classes

    result = Intervene(concepts=["red"], controls=8, error="kept")(context(module=Hub))
    assert result.scalars["kept_moved"] == 1 and result.scalars["kept_moved_others"] == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=12), st.integers(1, 5), st.integers(0, 10**6))
def test_clustered_means_do_not_depend_on_the_batches(lengths, per_batch, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in lengths]
    sums = ClusteredMeans(1, 2)
    for first in range(0, len(parts), per_batch):
        some = parts[first : first + per_batch]
        sequence = torch.cat([torch.full((len(part),), first + i) for i, part in enumerate(some)])
        sums.update(torch.cat(some), torch.ones(1, len(sequence), dtype=torch.bool), sequence)
    mean, total, g = torch.cat(parts).mean(0), sum(lengths), len(parts)
    off = torch.stack([(part - mean).sum(0) for part in parts])
    error = (off.square().sum(0) * g / (g - 1)).sqrt() / total
    assert sums.rows(0) == total and sums.sequences(0) == g
    torch.testing.assert_close(torch.tensor(sums.mean(0), dtype=torch.float64), mean)
    ends = torch.tensor(sums.intervals(0), dtype=torch.float64)
    from scipy.stats import t

    torch.testing.assert_close(ends[:, 1] - mean, error * float(t.ppf(0.975, g - 1)), rtol=1e-6, atol=1e-9)


def test_an_interval_covers_the_mean_of_correlated_rows():
    """Rows of one sequence are equal: 40 sequences tell as much as 40 rows, not 400."""
    covered = 0
    for seed in range(60):
        values = torch.randn(40, 1, generator=torch.Generator().manual_seed(seed)).repeat_interleave(10, 0)
        sums = ClusteredMeans(1, 1)
        sums.update(values, torch.ones(1, 400, dtype=torch.bool), torch.arange(40).repeat_interleave(10))
        low, high = sums.intervals(0)[0]
        covered += low <= 0 <= high
    assert covered >= 53  # 57 expected


# --- what cannot be done ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({"module": lambda: Planted("none")}, {}, r"output:? .*NoneType"),
        ({"module": lambda: Planted("dict")}, {}, r"output.*\.\[scores\]"),
        ({"output": "nowhere"}, {}, r"output.*nowhere"),
        ({"output_names": ["red", "green"]}, {}, r"output_names.*2 outputs and there are 3"),
        ({"output_names": ["red", "red", "green"]}, {}, r"output_names.*same name"),
        ({"output": "before"}, {"outputs": ["output 0"]}, r"output_names.*3 outputs and there are 40"),
        ({"output": "before", "output_names": None}, {}, r"do not depend on the activations"),
        ({}, {"latents": [30]}, r"latents.*no latent 30; the SAE has 30, 0 to 29"),
        ({}, {"latents": [-1]}, r"no latent -1"),
        ({}, {"concepts": ["gren"]}, r"concepts.*no concept 'gren'.*green"),
        ({}, {"targets": {"red": "rd"}}, r"targets.*no output 'rd'.*red"),
        ({}, {"targets": {"rot": "red"}}, r"targets.*no concept 'rot'"),
        ({}, {"outputs": ["blau"]}, r"outputs.*no output 'blau'"),
        ({"labels": None, "concepts": None}, {}, r"latents.*no labels"),
        ({"module": lambda: Planted("one"), "output_names": None}, {"scale": "softmax"}, r"scale.*one output"),
    ],
)
def test_bad_input_is_refused_before_training(source, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        Intervene(**options).prepare(context(**source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": "scale"}, r"value.*one"),
        ({"value": 1.0}, r"value.*none"),
        ({"edit": "scale", "value": 2.0, "unit": "max"}, r"unit"),
        ({"latents": [1, 1]}, r"latents.*twice"),
    ],
)
def test_options_that_do_not_fit_together(options, message):
    with pytest.raises(OptionError, match=message):
        Intervene(**options)


MODULE = {"use": "module", "module": "m.py:model", "data": "m.py:data", "hook_point": "0"}


def test_a_transcoder_is_refused():
    run = context()
    run.sae = SimpleNamespace(transcoder=True)
    with pytest.raises(ComponentError, match="transcoder"):
        Intervene().prepare(run)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"use": "synthetic", "d_in": 8, "n_features": 16}, "outputs"),
        ({**MODULE, "pool": "max"}, "maximum"),
        ({"use": "encoder", "model": ".", "data": "m.py", "hook_point": "0"}, "without a head"),
        ({**MODULE, "target_hook_point": "1"}, "target_hook_point"),
    ],
)
def test_a_source_that_cannot_run_its_model_is_refused_when_planned(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(
        "import torch\n\ndef model():\n    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))\n\n"
        "def data():\n    return [torch.zeros(4, 4)] * 9\n"
    )
    file = {
        "source": source, "architecture": {"use": "topk", "d_sae": 16, "k": 2}, "loss": [{"use": "mse"}],
        "analyzer": [{"use": "intervene", "latents": [0]}],
    }  # fmt: skip
    with pytest.raises(UsageError, match=message):
        saekit.run(file, directory=tmp_path / "run")


def test_from_a_run_file_with_a_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(
        "import torch\n\ndef model():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))\n\n"
        "def data(split, seed):\n    g = torch.Generator().manual_seed(seed)\n    for _ in range(8):\n"
        "        x = torch.randn(64, 4, generator=g)\n        yield x, (x[:, :2] > 0).float()\n"
    )
    file = {
        "source": {
            "use": "module", "module": "m.py:model", "data": "m.py:data", "hook_point": "1", "args": [0], "labels": 1,
            "concepts": ["a", "b"], "cache": "kept", "cache_tokens": 512,
        },
        "architecture": {"use": "topk", "d_sae": 16, "k": 3}, "loss": [{"use": "mse"}],
        "training": {"tokens": 4096, "batch_size": 128, "buffer": 512},
        "evaluation": {"tokens": 256},
        "analyzer": [{"use": "intervene", "controls": 3, "training_tokens": 1000}],
    }  # fmt: skip
    done = saekit.run(file, directory=tmp_path / "run")
    found = json.loads((done.directory / "analysis" / "intervene" / "result.json").read_text())
    assert found["scalars"]["latents"] == 2 and found["scalars"]["sequences"] == 512
    assert {row["output"] for row in found["tables"]["effects"]} == {"output 0", "output 1"}


def test_a_language_model_is_asked_about_some_of_its_tokens(tmp_path):
    """What an edit does to the logits is what a change of the residual stream does."""
    done = saekit.run(
        {
            "source": language_source(), "architecture": {"use": "topk", "d_sae": 32, "k": 4}, "loss": [{"use": "mse"}],
            "training": {"tokens": 512, "batch_size": 64, "buffer": 128}, "evaluation": {"tokens": 64},
            "analyzer": [{"use": "intervene", "latents": [3], "outputs": ["e", "t"], "edit": "set", "value": 4.0, "controls": 2,
                          "sequences": 4, "training_tokens": 256, "error": "kept"}],
        },
        directory=tmp_path / "run",
    )  # fmt: skip
    found = json.loads((done.directory / "analysis" / "intervene" / "result.json").read_text())
    rows = [row for row in found["tables"]["effects"] if row["rows"] == "all"]
    assert {row["output"] for row in rows} == {"e", "t"} and all(row["change"] != 0 for row in rows)
