"""Heads of all arms see the same batches; what is planted is learnt; the experiment's tables say what was found."""

import numpy as np
import pytest
import torch
from saekit_quality import heads
from saekit_quality.data import split
from saekit_quality.experiment import main, parse, run_cell
from saekit_quality.experiment_table import ARMS, as_markdown, paired
from saekit_quality.generator import generate
from saekit_quality.heads import HeadSettings, train_head
from saekit_quality.metrics import macro_auroc
from saekit_quality.votes import hard_targets

SHORT = HeadSettings(hidden=16, projection=8, learning_rate=1e-2, steps=40, check_every=20)


@pytest.fixture(scope="module")
def cell():
    """Data and features in which the true log odds stand plainly, beside noise."""
    data = split(generate(90, responses=2, noise=0.2, seed=0), {"train": 0.4, "validation": 0.2, "test": 0.4})
    draws, found = np.random.default_rng(0), {}
    for name, part in data.items():
        p = part.vote_probabilities.mean(1)
        found[name] = np.concatenate([np.log(p / (1 - p)), draws.standard_normal((len(part), 5))], 1).astype(np.float32)
    return found, data


def trained(cell, **options):
    features, data = cell
    validation = features["validation"], data["validation"].votes
    return train_head(features["train"], data["train"].votes, validation, settings=SHORT, **options)


def test_every_arm_sees_the_same_batches_in_the_same_order(cell, monkeypatch):
    seen = []
    forward = heads.Head.forward

    def noting(self, x):
        if self.training:
            seen.append(x.clone())
        return forward(self, x)

    monkeypatch.setattr(heads.Head, "forward", noting)
    streams = []
    hard = {"targets": "hard"}
    for options in (hard, {"targets": "soft"}, {**hard, "weight": 0.5}, {**hard, "weight": 0.5, "shuffled": True}):
        seen.clear()
        trained(cell, seed=1, **options)
        streams.append(torch.cat(seen))
    assert all(torch.equal(stream, streams[0]) for stream in streams[1:])
    assert len(streams[0]) == 40 * 32


def test_a_head_learns_what_is_planted_and_training_is_repeatable(cell):
    features, data = cell
    one, again = (trained(cell, targets="soft", weight=0.1, pairs="agreement", seed=2) for _ in range(2))
    logits, z = one(features["test"])
    np.testing.assert_array_equal(logits, again(features["test"])[0])
    assert macro_auroc(1 / (1 + np.exp(-logits)), hard_targets(data["test"].votes)) > 0.7
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)


def test_a_cell_has_every_arm_below_its_ceiling_and_the_tables_compare_them(cell):
    features, data = cell
    results = [
        {"seed": seed, "noise": 0.2, "labels": 48, "arms": run_cell(features, data, 48, weights=[0.1], seed=seed, settings=SHORT)}
        for seed in range(2)
    ]
    arms = results[0]["arms"]
    assert set(arms) == {"ceiling", *ARMS} and arms["hard_contrast"]["weight"] == 0.1
    assert all(0.5 < arms[arm]["auroc"] < arms["ceiling"]["auroc"] + 0.03 for arm in ARMS)
    assert arms["hard_contrast"]["auroc"] != arms["hard_shuffled"]["auroc"]
    table = as_markdown(results)
    assert table.count("| 0.2 | 48 |") == 5 and "less BCE hard" in table


def test_paired_differences_have_students_interval():
    mean, ends = paired([0.01, 0.03, 0.02])
    reach = 4.30265 * 0.01 / 3**0.5
    assert mean == pytest.approx(0.02) and ends == pytest.approx((0.02 - reach, 0.02 + reach), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1"], "at least 2"),
        (["--noise", "0.9"], "0 to 0.6"),
        (["--weights", "0"], "above 0"),
        (["--labels", "1"], "--labels"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--out", "x", *options])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_an_encoder_that_is_not_there_is_named(tmp_path, capsys):
    code = main(["--out", str(tmp_path), "--labels", "8", "--encoder", str(tmp_path / "none")])
    assert code == 2 and "--encoder" in capsys.readouterr().err


def test_a_stopped_run_goes_on_with_what_is_missing_and_refuses_results_of_other_options(tmp_path, monkeypatch, capsys):
    from saekit_quality import experiment

    monkeypatch.setattr(experiment, "VALIDATION", 3)
    monkeypatch.setattr(experiment, "TEST", 20)
    monkeypatch.setattr(experiment, "features_of", lambda data, *_: data.vote_probabilities.mean(1).astype(np.float32))
    arguments = ["--out", str(tmp_path), "--labels", "8", "--noise", "0", "--steps", "2", "--weights", "0.1"]
    experiment.run(parse([*arguments, "--seeds", "2"]))
    cells, run_cell = [], experiment.run_cell
    monkeypatch.setattr(experiment, "run_cell", lambda *a, **k: cells.append(k["seed"]) or run_cell(*a, **k))
    found = experiment.run(parse([*arguments, "--seeds", "3"]))
    assert cells == [2] and [entry["seed"] for entry in found] == [0, 1, 2]
    assert main([*arguments, "--steps", "3"]) == 2 and "of a run with --steps 2" in capsys.readouterr().err
