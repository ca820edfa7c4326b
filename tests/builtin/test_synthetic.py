"""The source `synthetic` gives what it says: the planted directions, as often as asked, the same whenever asked."""

import itertools
import math
from pathlib import Path

import pytest
import tomli_w
import torch

import saekit
from saekit.activations.shuffle import ShuffledBatches
from saekit.builtin.sources import SyntheticSource
from saekit.errors import UsageError

CPU = torch.device("cpu")


def opened(**options):
    source = SyntheticSource(**{"d_in": 16, "n_features": 12, "probability": 0.1, "held_out": 2500, **options})
    source.open(device=CPU, dtype=torch.float32)
    return source


def some(source, split="train", n=None, size=2048, seed=0, start=0, what="blocks"):
    return list(itertools.islice(getattr(source, what)(split, size=size, seed=seed, start=start), n))


def test_block_b_of_a_fresh_source_is_block_b_of_a_running_one():
    running = some(opened(concepts=[3]), n=6)
    for start in (0, 1, 5):
        (fresh,) = some(opened(concepts=[3]), n=1, start=start)
        assert torch.equal(fresh.x, running[start].x) and torch.equal(fresh.labels, running[start].labels)
    assert len({float(block.x.sum()) for block in running}) == 6
    assert not torch.equal(some(opened(), n=1, seed=1)[0].x, running[0].x)


def test_held_out_ends_and_depends_neither_on_the_runs_seed_nor_on_the_size_of_blocks():
    source = opened(concepts=[0])
    whole = some(source, "held_out", size=10**6)
    parts = some(source, "held_out", size=1000, seed=7)
    assert len(whole) == 1 and len(parts) == 3
    assert torch.equal(torch.cat([p.x for p in parts]), whole[0].x) and len(whole[0]) == 2500
    assert torch.equal(torch.cat([p.labels for p in parts]), whole[0].labels)
    assert not torch.equal(whole[0].x[:1024], some(source, n=1)[0].x[:1024])


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_activations_are_the_true_codes_times_the_truth(split):
    source = opened(noise=0.0, concepts=[5, 2], pairs=2)
    for block, code in zip(some(source, split, 2), some(source, split, 2, what="codes"), strict=True):
        torch.testing.assert_close(block.x, code.dense() @ source.truth, atol=1e-5, rtol=1e-5)
        assert torch.equal(block.labels, (code.columns(torch.tensor([5, 2])) != 0).float())
    assert source.concepts == ["feature 5", "feature 2"]


def test_noise_has_the_deviation_asked_for():
    blocks = zip(some(opened(noise=0.3), n=4), some(opened(noise=0.0), n=4), strict=True)
    noise = torch.cat([noisy.x - clean.x for noisy, clean in blocks])
    assert noise.std() == pytest.approx(0.3, rel=0.01) and abs(float(noise.mean())) < 0.01
    assert noise.T.corrcoef().fill_diagonal_(0).abs().max() < 0.06


def active(source, rows=60_000):
    return torch.cat([c.dense() for c in some(source, n=rows // 2048, what="codes")])


def test_each_feature_is_active_as_often_as_asked_and_independently():
    probabilities = [0.01, 0.05, 0.2, 0.5, 0.9, 0.3]
    code = active(opened(n_features=6, probability=probabilities))
    fired = (code != 0).double()
    n = len(fired)
    for p, share in zip(probabilities, fired.mean(0).tolist(), strict=True):
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n)
    assert fired.T.corrcoef().fill_diagonal_(0).abs().max() < 4.5 / math.sqrt(n)
    values = code[code != 0]
    assert values.min() >= 0.5 and values.max() <= 1.5
    assert values.mean() == pytest.approx(1.0, abs=0.01) and values.std() == pytest.approx(1 / math.sqrt(12), abs=0.01)


def test_a_pair_has_the_correlation_asked_for_and_keeps_its_frequencies():
    source = opened(n_features=6, probability=[0.1, 0.3, 0.05, 0.05, 0.2, 0.4], pairs=2, correlation=0.7)
    assert source.probability.tolist() == pytest.approx([0.2, 0.2, 0.05, 0.05, 0.2, 0.4])
    fired = (active(source) != 0).double()
    assert fired.mean(0).tolist() == pytest.approx(source.probability.tolist(), abs=0.01)
    correlation = fired.T.corrcoef()
    assert float(correlation[0, 1]) == pytest.approx(0.7, abs=0.02)
    assert float(correlation[2, 3]) == pytest.approx(0.7, abs=0.03)
    assert correlation[[0, 1, 4], [2, 4, 5]].abs().max() < 0.02


def test_a_power_law_keeps_the_mean():
    probability = opened(probability=0.1, power=0.5).probability
    assert probability.mean() == pytest.approx(0.1)
    assert probability[3] / probability[0] == pytest.approx(4**-0.5)


def test_directions_are_units_and_at_right_angles_if_asked():
    assert opened().truth.norm(dim=1).tolist() == pytest.approx([1.0] * 12, abs=1e-5)
    truth = opened(orthogonal=True).truth
    torch.testing.assert_close(truth @ truth.T, torch.eye(12), atol=1e-5, rtol=0)
    assert torch.equal(truth, opened(orthogonal=True).truth) and not torch.equal(
        truth, opened(orthogonal=True, seed=1).truth
    )


def test_a_sequence_has_its_concepts_at_every_position_or_at_none():
    source = opened(orthogonal=True, noise=0.0, concepts=[4, 7], length=5, pairs=3)
    batch = source.sequences("train", 200, 0, 3)
    assert batch.x.shape == (200, 5, 16) and batch.mask.all() and batch.labels.shape == (200, 2)
    present = (batch.x @ source.truth[[4, 7]].T) > 0.25  # [n, T, 2]
    assert torch.equal(present, batch.labels.bool()[:, None].expand(-1, 5, -1))
    assert batch.labels.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.12)


def test_sequences_are_a_function_of_the_seed_and_the_number():
    source = opened(concepts=[4])
    ones = [source.sequences("train", 1, 5, number).x for number in range(6, 9)]
    assert torch.equal(source.sequences("train", 3, 5, 2).x, torch.cat(ones))
    assert torch.equal(opened(concepts=[4]).sequences("train", 3, 5, 2).x, torch.cat(ones))
    assert not torch.equal(source.sequences("train", 3, 6, 2).x, torch.cat(ones))
    held_out = [source.sequences("held_out", 100, 5, number) for number in range(3)]
    assert [len(batch) for batch in held_out] == [100, 56, 0]  # 2500 activations in sequences of 16
    assert torch.equal(held_out[1].x, source.sequences("held_out", 100, 9, 1).x)


def test_a_training_stream_restarts_bit_for_bit():
    source = opened()
    with ShuffledBatches(source, batch_size=100, block_size=2048, seed=3, prefetch=1) as stream:
        run = [(next(stream).x, stream.position) for _ in range(50)]
    with ShuffledBatches(opened(), batch_size=100, block_size=2048, seed=3, position=run[29][1]) as stream:
        for x, position in run[30:]:
            assert torch.equal(next(stream).x, x) and stream.position == position


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 2.0}, "^low: 2.0 is more than high"),
        ({"n_features": 17, "orthogonal": True}, "^orthogonal: 17 directions .* Lower n_features to 16"),
        ({"concepts": [12]}, "^concepts: there is no feature 12; there are 0 to 11"),
        ({"probability": [0.1, 0.2]}, "^probability: lists 2 numbers for 12 features"),
        ({"probability": 0.9, "power": 2.0}, "^probability: feature 0 would be active with probability"),
        ({"probability": 0.0}, "must be more than 0 and less than 1"),
        ({"probability": [0.1] * 12, "power": 1.0}, "^power: goes with one probability"),
        ({"pairs": 7}, "^pairs: 7 pairs need 14 features"),
    ],
)
def test_what_cannot_be_made(options, message):
    with pytest.raises(UsageError, match=message):
        opened(**options)


def test_without_concepts_there_are_no_sequences():
    with pytest.raises(UsageError, match="^concepts: is empty"):
        opened().sequences("train", 4, 0, 0)
    with pytest.raises(UsageError, match="split 'test'"):
        some(opened(), "test", 1)


def run_file(tmp_path: Path, **source) -> Path:
    table = {
        "source": {"use": "synthetic", "d_in": 16, "n_features": 12, "probability": 0.1, "held_out": 1000, **source},
        "architecture": {"use": "topk", "d_sae": 24, "k": 2},
        "loss": [{"use": "mse"}],
        "training": {"tokens": 640, "batch_size": 64, "buffer": 512, "device": "cpu"},
        "evaluation": {"tokens": 500},
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return path


def test_a_run_from_a_file(tmp_path):
    summary = saekit.run(run_file(tmp_path, concepts=[1]), directory=tmp_path / "run").summary
    assert summary["metrics"]["l0"] <= 2 and summary["sae"]["d_in"] == 16


def test_a_part_that_needs_labels_is_told_how_to_have_them(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text(
        "from saekit import Component, Step, hookimpl\n"
        "def needy(step: Step):\n    return step.labels.mean() + step.error.square().mean()\n"
        "@hookimpl\ndef saekit_losses():\n    yield Component('needy', needy, needs=('labels',))\n"
    )
    path = run_file(tmp_path)
    path.write_text(path.read_text().replace('use = "mse"', 'use = "needy"'))
    message = "needs 'labels', which source 'synthetic' does not provide with these options. List features"
    with pytest.raises(UsageError, match=message):
        saekit.run(path, plugins=[tmp_path / "needy.py"], directory=tmp_path / "run")
    saekit.run(path, plugins=[tmp_path / "needy.py"], directory=tmp_path / "run", overrides={"source.concepts": [1]})
