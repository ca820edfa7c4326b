"""Metrics of held-out batches against plain loops over rows, in float64, however the rows are divided into batches."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
import torch
from safetensors.torch import save_file

import saekit
from saekit import Registry, Step
from saekit.builtin.metrics import Cosine, ExplainedVariance, Histograms, RelativeBias
from saekit.builtin.recovery import DictionaryRecovery
from saekit.builtin.token_sparsity import CLASSES, TokenSparsity, class_of
from saekit.sae.code import DenseCode

ROWS, WIDTH, LATENTS = 60, 5, 7
STRINGS = [" the", "ing", "12", "),", "\n", "</s>", " cat"]
OF_CLASS = ["word_initial", "continuation", "digits", "punctuation", "whitespace", "special", "word_initial"]


@pytest.fixture
def data():
    """Sixty rows: activations, a code of which two latents are never active, and reconstructions that are too short."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator) + 0.5
    code = torch.randn(ROWS, LATENTS, generator=generator).relu() * torch.tensor([1, 1, 0.1, 3, 0, 1, 0])
    reconstruction = 0.8 * x + 0.1 * torch.randn(ROWS, WIDTH, generator=generator)
    x[3] = 0.0
    reconstruction[5] = 0.0
    tokens = torch.randint(0, len(STRINGS) - 1, (ROWS,), generator=generator)  # the last one does not occur
    tokens[tokens == 4] = 6  # nor does whitespace
    return SimpleNamespace(x=x, code=code, reconstruction=reconstruction, tokens=tokens)


def context(**source):
    sae = SimpleNamespace(W_dec=torch.randn(LATENTS, WIDTH, generator=torch.Generator().manual_seed(1)))
    return SimpleNamespace(source=SimpleNamespace(**source), sae=sae, seed=0)


def measured(metric, data, *sizes, prepared=None):
    """What the metric computes when it sees the rows in batches of these sizes."""
    if prepared is not None:
        metric.prepare(prepared)
    start = 0
    for size in sizes or (ROWS,):
        rows = slice(start, start + size)
        metric.update(
            Step(
                x=data.x[rows],
                target=data.x[rows],
                code=DenseCode(data.code[rows]),
                reconstruction=data.reconstruction[rows],
                sae=None,
                tokens=data.tokens[rows],
            )
        )
        start += size
    return metric.compute()


def rows_of(data):
    return zip(data.x.double().tolist(), data.reconstruction.double().tolist(), strict=True)


@pytest.mark.parametrize("sizes", [(60,), (1, 59), (20, 25, 15)])
def test_cosine(data, sizes):
    cosines = []
    for x, r in rows_of(data):
        product, lengths = sum(a * b for a, b in zip(x, r, strict=True)), math.hypot(*x) * math.hypot(*r)
        if math.hypot(*x):
            cosines.append(product / lengths if lengths else 0.0)
    assert len(cosines) == ROWS - 1
    assert measured(Cosine(), data, *sizes) == {"cosine": pytest.approx(sum(cosines) / len(cosines), abs=1e-12)}


@pytest.mark.parametrize("sizes", [(60,), (20, 25, 15)])
def test_relative_bias_is_the_factor_that_fits_best(data, sizes):
    gamma = measured(RelativeBias(), data, *sizes)["relative_bias"]
    square = sum(b * b for _, r in rows_of(data) for b in r)
    product = sum(a * b for x, r in rows_of(data) for a, b in zip(x, r, strict=True))
    assert gamma == pytest.approx(square / product, abs=1e-12)
    assert 0.7 < gamma < 0.9

    def error(g):
        return float((data.reconstruction.double() / g - data.x.double()).square().sum())

    assert error(gamma) < min(error(gamma * 1.001), error(gamma * 0.999))


def test_values_that_are_not_defined(data):
    nothing = SimpleNamespace(**{**vars(data), "x": data.x * 0, "code": data.code * 0})
    assert measured(Cosine(), nothing)["cosine"] is None
    assert measured(RelativeBias(), nothing)["relative_bias"] is None
    assert measured(Histograms(), nothing)["activation_q50"] is None
    values = measured(DictionaryRecovery(), nothing, prepared=context(truth=torch.eye(WIDTH)))
    assert values["recovery"] is None and values["recovered_fraction"] is None and values["recovery_control"] > 0


def test_a_reconstruction_that_is_not_finite_does_not_count_as_a_score(data):
    data.reconstruction[7] = torch.nan
    for metric, name in ((Cosine(), "cosine"), (RelativeBias(), "relative_bias"), (ExplainedVariance(), "explained_variance")):
        assert math.isnan(measured(metric, data)[name])


def test_activations_that_are_equal_but_for_rounding_do_not_vary():
    x = torch.randn(8, generator=torch.Generator().manual_seed(0)).expand(1000, 8)
    same = SimpleNamespace(x=x, code=torch.ones(len(x), 2), reconstruction=x * 0.9, tokens=torch.zeros(len(x)))
    assert measured(ExplainedVariance(), same, 256, 256, 256, 232)["explained_variance"] is None


@pytest.mark.parametrize("sizes", [(60,), (20, 25, 15)])
def test_quantiles_of_histograms(data, sizes):
    found = measured(Histograms(), data, *sizes)
    density = [sum(v > 0 for v in column) / ROWS for column in data.code.T.tolist()]
    active = sorted(v for row in data.code.tolist() for v in row if v > 0)
    for name, q in Histograms.QUANTILES.items():
        assert found[f"density_{name}"] == pytest.approx(float(torch.tensor(density, dtype=torch.float64).quantile(q)))
        exact = active[max(0, math.ceil(q * len(active)) - 1)]
        assert found[f"activation_{name}"] == pytest.approx(exact, rel=0.011)


@pytest.mark.parametrize("sizes", [(60,), (1, 59), (20, 25, 15)])
def test_sparsity_by_class_of_token(data, sizes):
    source = {"token_strings": lambda tokens: [STRINGS[t] for t in tokens.tolist()], "special_tokens": [5]}
    found = measured(TokenSparsity(), data, *sizes, prepared=context(**source))
    mean = data.x.double().mean(0)
    for name in CLASSES:
        chosen = [i for i, token in enumerate(data.tokens.tolist()) if OF_CLASS[token] == name]
        assert found[f"share_{name}"] == pytest.approx(len(chosen) / ROWS)
        if name == "whitespace":
            assert not chosen and found["l0_whitespace"] is None and found["explained_variance_whitespace"] is None
            continue
        l0 = sum(sum(v > 0 for v in data.code[i].tolist()) for i in chosen) / len(chosen)
        error = sum(float((data.x[i] - data.reconstruction[i]).double().square().sum()) for i in chosen)
        spread = sum(float((data.x[i].double() - mean).square().sum()) for i in chosen)
        assert found[f"l0_{name}"] == pytest.approx(l0)
        assert found[f"explained_variance_{name}"] == pytest.approx(1 - error / spread, abs=1e-6)


def test_classes_of_tokens():
    assert [class_of(text) for text in STRINGS[:5]] == OF_CLASS[:5]
    assert [class_of(text) for text in ("\ufffd", " 3.5", "_", "\t ", "é", " don't")] == [
        "continuation",
        "word_initial",
        "punctuation",
        "whitespace",
        "continuation",
        "word_initial",
    ]


@pytest.mark.parametrize("sizes", [(60,), (20, 25, 15)])
def test_recovery_against_a_loop_over_pairs(data, sizes):
    truth = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))
    prepared = context(truth=truth)
    found = measured(DictionaryRecovery(), data, *sizes, prepared=prepared)
    living = [j for j in range(LATENTS) if (data.code[:, j] != 0).any()]
    assert len(living) == 5
    cosine = [
        [
            float(torch.nn.functional.cosine_similarity(t.double(), prepared.sae.W_dec[j].double(), dim=0))
            for j in living
        ]
        for t in truth
    ]
    best = [max(row) for row in cosine]
    assert found["recovery"] == pytest.approx(sum(best) / 4)
    assert found["recovery_reverse"] == pytest.approx(sum(max(column) for column in zip(*cosine, strict=True)) / 5)
    assert found["recovered_fraction"] == sum(b >= 0.9 for b in best) / 4
    assert found["recovery_control"] == measured(DictionaryRecovery(), data, prepared=prepared)["recovery_control"]


def test_recovery_of_the_truth_itself_is_one_and_of_its_opposite_is_not():
    truth = torch.nn.functional.normalize(torch.randn(LATENTS, 64, generator=torch.Generator().manual_seed(3)), dim=1)
    everything = SimpleNamespace(
        x=torch.zeros(2, 64), code=torch.ones(2, LATENTS), reconstruction=torch.zeros(2, 64), tokens=torch.zeros(2)
    )
    prepared = context(truth=truth)
    prepared.sae.W_dec = 3.0 * truth.flip(0)
    found = measured(DictionaryRecovery(), everything, 2, prepared=prepared)
    assert found["recovery"] == pytest.approx(1.0) and found["recovery_reverse"] == pytest.approx(1.0)
    assert found["recovered_fraction"] == 1.0 and found["recovery_control"] < 0.4
    prepared.sae.W_dec = -truth
    assert measured(DictionaryRecovery(), everything, 2, prepared=prepared)["recovery"] < 0.4


@pytest.mark.parametrize("make", [Cosine, RelativeBias, Histograms, TokenSparsity, DictionaryRecovery])
def test_ranks_reduce_by_adding(data, make):
    """Two halves, their states added, give what the whole gives; and every value has a meaning."""
    prepared = context(truth=torch.eye(WIDTH), token_strings=lambda tokens: [STRINGS[t] for t in tokens.tolist()])
    halves, whole = [make(), make()], make()
    sums = [name for name, value in vars(whole).items() if isinstance(value, torch.Tensor)]
    assert sums
    for part, rows in zip(halves, (slice(0, 25), slice(25, ROWS)), strict=True):
        one = SimpleNamespace(**{name: value[rows] for name, value in vars(data).items()})
        measured(part, one, len(one.x), prepared=prepared if hasattr(part, "prepare") else None)
    for name in sums:
        setattr(halves[0], name, sum(getattr(half, name) for half in halves))
    expected = measured(whole, data, prepared=prepared if hasattr(whole, "prepare") else None)
    found = halves[0].compute()
    assert found == {name: None if v is None else pytest.approx(v, abs=1e-12) for name, v in expected.items()}
    assert set(found) <= set(make.meanings)


def test_a_run_finds_a_planted_dictionary(tmp_path: Path):
    table = {
        "source": {"use": "synthetic", "d_in": 32, "n_features": 48, "probability": 0.04, "held_out": 4000},
        "architecture": {"use": "topk", "d_sae": 64, "k": 4},
        "loss": [{"use": "mse"}],
        "metric": [{"use": name} for name in ("dictionary_recovery", "cosine", "relative_bias", "histograms")],
        "training": {"tokens": 400_000, "batch_size": 512, "buffer": 8192, "lr": 3e-3, "device": "cpu"},
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    metrics = saekit.run(path, directory=tmp_path / "run").summary["metrics"]
    assert metrics["recovery"] > 0.9 > 0.6 > metrics["recovery_control"]
    assert metrics["recovered_fraction"] > 0.9
    assert metrics["cosine"] > 0.8  # one activation in seven has no feature in it, and is noise
    assert 0.8 < metrics["relative_bias"] < 1.1 and metrics["density_q50"] > 0


def test_a_run_with_token_classes(tiny_gpt2, text_file, tmp_path):
    table = {
        "source": {
            "use": "text",
            "model": str(tiny_gpt2),
            "data": str(text_file),
            "hook_point": "blocks.1.hook_out",
            "context": 32,
        },
        "architecture": {"use": "topk", "d_sae": 64, "k": 4},
        "loss": [{"use": "mse"}],
        "metric": [{"use": "token_sparsity"}],
        "training": {"tokens": 640, "batch_size": 64, "buffer": 512, "device": "cpu"},
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    metrics = saekit.run(path, directory=tmp_path / "run").summary["metrics"]
    assert sum(metrics[f"share_{name}"] for name in CLASSES) == pytest.approx(1.0)
    assert metrics["share_word_initial"] > 0.1 and metrics["l0_word_initial"] == 4.0


def held_out_run(tmp_path: Path, change):
    """The summary of a run on stored activations, after `change(x, rows)` of the held-out rows alone; two variants."""
    x, path = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)), tmp_path / "x.safetensors"
    options = {"data": str(path), "chunk": 128, "held_out": 0.25}
    save_file({"activations": x}, path)
    component = Registry().find("source", "tensors")
    source = component.build(component.validate(options, "source"))
    source.open(device=torch.device("cpu"), dtype=torch.float32)
    rows = torch.cat([block.sequence for block in source.blocks("held_out", size=512, seed=0)])
    change(x, rows)
    save_file({"activations": x}, path)
    table = {
        "source": {"use": "tensors", **options},
        "architecture": {"use": "topk", "d_sae": 16, "k": 2},
        "loss": [{"use": "mse"}],
        "metric": [{"use": name} for name in ("cosine", "relative_bias", "histograms")],
        "training": {"tokens": 512, "batch_size": 64, "buffer": 512, "device": "cpu"},
        "variant": [{"name": "a"}, {"name": "b", "training": {"seed": 1}}],
    }
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(table), encoding="utf-8")
    return saekit.run(file, directory=tmp_path / "run").summary


def test_a_run_leaves_out_held_out_activations_that_are_not_finite_and_says_so_once(tmp_path: Path):
    def change(x, rows):
        x[rows[[3, 700]], 2] = torch.inf

    summary = held_out_run(tmp_path, change)
    for one in summary["variants"].values():
        assert all(value is not None for value in one["metrics"].values())
    told = [warning for warning in summary["warnings"] if "not finite" in warning]
    assert told == ["2 of 1,024 held-out activations of tensors are not finite, the first in batch 1; they are left out."]


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_run_gives_the_reason_for_every_null(tmp_path: Path, value: float):
    def change(x, rows):
        x[rows] = value

    summary = held_out_run(tmp_path, change)
    for name, one in summary["variants"].items():
        nulls = {metric for metric, found in one["metrics"].items() if found is None}
        assert {"explained_variance", "fvu"} <= nulls and ("cosine" in nulls) == (value == 0.0)
        told = [warning for warning in summary["warnings"] if warning.startswith(f"variant {name!r}: Not defined")]
        assert {metric for metric in nulls if any(metric in warning for warning in told)} == nulls
        assert any("explained_variance, fvu (the activations do not vary at all)" in warning for warning in told)
