"""The source `tensors`: every stored row comes once a pass, with what belongs to it, and bad files are named."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from safetensors.torch import save_file

import saekit
from saekit.activations.shuffle import ShuffledBatches
from saekit.builtin.sources import TensorsSource
from saekit.errors import UsageError

CPU = torch.device("cpu")
WIDTH = 4


def opened(data, **options):
    source = TensorsSource(data=str(data), **{"chunk": 8, "held_out": 0.1, **options})
    source.open(device=CPU, dtype=torch.float32)
    return source


def numbered(first, n, dtype=torch.float32):
    """Rows whose first coordinate says their number."""
    rows = torch.zeros(n, WIDTH, dtype=dtype)
    rows[:, 0] = torch.arange(first, first + n)
    return rows


@pytest.fixture
def flat(tmp_path):
    """Rows 0 to 229 in three files, with tokens and labels."""
    for file, (first, n) in enumerate([(0, 100), (100, 57), (157, 73)]):
        numbers = torch.arange(first, first + n)
        save_file(
            {
                "activations": numbered(first, n),
                "ids": numbers * 3,
                "label": (numbers % 2).float(),
                "out": torch.stack([numbers.float()] * 2, 1),
            },
            tmp_path / f"part{file}.safetensors",
        )
    return tmp_path


@pytest.fixture
def deep(tmp_path):
    """Sequences 0 to 49 of three positions in two files; position t of sequence i is i + t / 10; some are padded."""
    for file, (first, n) in enumerate([(0, 30), (30, 20)]):
        numbers = torch.arange(first, first + n)
        x = torch.zeros(n, 3, WIDTH)
        x[:, :, 0] = numbers[:, None] + torch.arange(3) / 10
        labels = torch.stack([(numbers % 2).float(), torch.where(numbers % 5 == 0, torch.nan, 1.0)], 1)
        labels[numbers == 7] = torch.nan
        mask = torch.ones(n, 3, dtype=torch.bool)
        mask[numbers % 4 == 0, 2] = False
        tensors = {"h": x, "y": labels, "mask": mask, "ids": numbers[:, None] * 10 + torch.arange(3), "out": x[..., :2] * 2}
        save_file(tensors, tmp_path / f"part{file}.safetensors")
    return tmp_path


def blocks(source, split, n=None, size=64, seed=0, start=0):
    return list(itertools.islice(source.blocks(split, size=size, seed=seed, start=start), n))


def numbers(found):
    return torch.cat([block.x[:, 0] for block in found])


@pytest.mark.parametrize("suffix", ["safetensors", "npy"])
def test_a_pass_has_every_row_that_is_not_held_out_once(tmp_path, suffix):
    for file in range(3):
        rows = numbered(file * 40, 40)
        path = tmp_path / f"{file}.{suffix}"
        np.save(path, rows.numpy()) if suffix == "npy" else save_file({"activations": rows}, path)
    source = opened(tmp_path)  # 15 chunks of 8, two of them held out
    held_out = blocks(source, "held_out")
    assert (numbers(held_out).diff() > 0).all() and len(numbers(held_out)) == 16
    two_passes = numbers(blocks(source, "train", 2 * 13, size=8))
    for one in two_passes.view(2, -1):
        assert sorted(one.tolist() + numbers(held_out).tolist()) == list(range(120))
    assert not torch.equal(*two_passes.view(2, -1))
    files = two_passes[:104].view(13, 8)[:, 0].div(40, rounding_mode="floor")
    assert (files.diff() < 0).any()  # chunks are shuffled across files


def test_what_belongs_to_a_row_comes_with_it(flat):
    source = opened(flat, tokens="ids", labels="label", target="out", concepts=["odd"])
    assert (source.d_in, source.d_out, source.concepts, source.withheld) == (
        WIDTH,
        2,
        ["odd"],
        {"sequences": "The activations are [n, d]; store sequences, as [n, T, d], under 'activations'."},
    )
    for block in [*blocks(source, "train", 7), *blocks(source, "held_out")]:
        number = block.x[:, 0].long()
        assert torch.equal(block.tokens, number * 3) and torch.equal(block.sequence, number)
        assert torch.equal(block.labels, (number % 2).float()[:, None]) and torch.equal(
            block.target[:, 1], number.float()
        )
    assert source.token_strings(torch.tensor([7, 8])) == ["<7>", "<8>"]


def test_sequences_are_flattened_without_what_is_masked(deep):
    source = opened(deep, key="h", labels="y", mask="mask", tokens="ids", chunk=6)
    found = [*blocks(source, "held_out"), *blocks(source, "train", 23, size=6)]
    whole = {
        name: torch.cat([getattr(b, name) for b in found]) for name in ("x", "sequence", "position", "tokens", "labels")
    }
    order = (whole["sequence"] * 3 + whole["position"]).argsort()
    sequence, position = whole["sequence"][order], whole["position"][order]
    expected = [(i, t) for i in range(50) for t in range(3) if not (i % 4 == 0 and t == 2)]
    assert list(zip(sequence.tolist(), position.tolist(), strict=True)) == expected
    torch.testing.assert_close(whole["x"][order][:, 0], sequence + position / 10)
    assert torch.equal(whole["tokens"][order], sequence * 10 + position)
    first, second = whole["labels"][order].T
    assert torch.equal(first.isnan(), sequence == 7) and torch.equal(
        first[sequence != 7], (sequence % 2)[sequence != 7].float()
    )
    assert torch.equal(second.isnan(), (sequence % 5 == 0) | (sequence == 7))


def test_labelled_sequences_come_whole_and_once_a_pass(deep):
    source = opened(deep, key="h", labels="y", mask="mask", tokens="ids", chunk=6)
    held_out = [source.sequences("held_out", 2, 0, number) for number in range(4)]
    kept = torch.cat([batch.tokens[:, 0] // 10 for batch in held_out]).tolist()
    assert kept != sorted(kept) and len(set(kept)) == len(kept) and len(held_out[3]) == 0 and held_out[3].x.shape == (0, 3, WIDTH)
    n = 50 - 1 - len(kept)  # sequence 7 has no label
    batch = source.sequences("train", n, 0, 0)
    number = batch.tokens[:, 0] // 10
    assert sorted([*number.tolist(), *kept, 7]) == list(range(50)) or 7 in kept
    torch.testing.assert_close(batch.x[:, :, 0], number[:, None] + torch.arange(3) / 10)
    assert torch.equal(batch.labels[:, 0], (number % 2).float())
    assert torch.equal(batch.mask[:, 2], number % 4 != 0)
    again = opened(deep, key="h", labels="y", mask="mask", tokens="ids", chunk=6)
    assert torch.equal(again.sequences("train", 5, 3, 11).x, source.sequences("train", 5, 3, 11).x)
    assert not torch.equal(source.sequences("train", n, 1, 0).x, batch.x)
    assert batch.target is None
    paired = opened(deep, key="h", labels="y", mask="mask", tokens="ids", target="out", chunk=6).sequences("train", n, 0, 0)
    assert torch.equal(paired.x, batch.x) and torch.equal(paired.target, 2 * batch.x[..., :2])


def test_files_held_out_are_whole_files(flat):
    source = opened(flat, held_out_by="file")
    assert sorted(numbers(blocks(source, "held_out")).tolist()) == list(range(100, 157))


def test_half_precision_is_handed_over_as_asked(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save_file({"activations": numbered(0, 32, dtype)}, tmp_path / "x.safetensors")
        source = opened(tmp_path)
        assert blocks(source, "train", 1)[0].x.dtype == torch.float32
        assert len(numbers(blocks(source, "held_out")).unique()) == 8


def test_a_training_stream_restarts_bit_for_bit(flat):
    with ShuffledBatches(opened(flat), batch_size=10, block_size=64, seed=3, prefetch=1) as stream:
        run = [(next(stream).x, stream.position) for _ in range(60)]
    with ShuffledBatches(opened(flat), batch_size=10, block_size=64, seed=3, position=run[29][1]) as stream:
        for x, position in run[30:]:
            assert torch.equal(next(stream).x, x) and stream.position == position


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the mapped files of a process are listed on Linux")
def test_no_file_stays_mapped(flat):
    source = opened(flat)
    held = blocks(source, "train", 3)
    assert held and str(flat) not in Path("/proc/self/maps").read_text()


def test_identity_follows_the_content(flat):
    first = opened(flat).identity()
    assert first == opened(flat).identity()
    save_file({"activations": numbered(5, 73)}, flat / "part2.safetensors")
    assert opened(flat).identity() != first


def test_a_label_that_never_changes_is_told(tmp_path):
    save_file({"activations": numbered(0, 40), "y": torch.ones(40, dtype=torch.long)}, tmp_path / "x.safetensors")
    assert opened(tmp_path, labels="y", concepts=["kind"]).warnings == [
        f"The label 'kind' of {tmp_path} is 1 in each of the 40 rows that have it."
    ]


def bad(tmp_path: Path, *files, **options):
    for number, tensors in enumerate(files):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / f"{number}.safetensors")
    with pytest.raises(UsageError) as caught:
        opened(tmp_path, **options)
    return str(caught.value)


X = numbered(0, 40)


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        (
            [{"activation": X}],
            {},
            ["0.safetensors has no tensor 'activations'", "Did you mean 'activation'", "key: "],
        ),
        ([{"activations": X.long()}], {}, ["0.safetensors, 'activations': is int64 [40, 4]", "floating-point"]),
        ([{"activations": X[0]}], {}, ["is float32 [4]", "[n, d], or [n, T, d]"]),
        (
            [{"activations": X}, {"activations": X[:, :3]}],
            {},
            ["1.safetensors, 'activations': is float32 [40, 3], but", "0.saf"],
        ),
        ([{"activations": X}, {"activations": X.half()}], {}, ["1.safetensors", "float16 [40, 4], but", "float32"]),
        (
            [{"activations": X, "y": X[:39, 0]}],
            {"labels": "y"},
            ["'y': is float32 [39], and labels of float32 [40, 4] must be"],
        ),
        ([{"activations": X, "y": X[:, 0]}], {"labels": "y"}, ["0.safetensors, 'y', row 2: [2.0] is not a label"]),
        ([{"activations": X, "t": X[:, 0]}], {"tokens": "t"}, ["'t': is float32 [40]; tokens are whole numbers"]),
        ([{"activations": X, "o": X.long()}], {"target": "o"}, ["'o': is int64", "target are floating-point"]),
        ([{"activations": X, "m": X[:, 0]}], {"mask": "m"}, ["mask of", "only sequences"]),
        (
            [{"activations": X, "y": X.sign()}],
            {"labels": "y", "concepts": ["a"]},
            ["concepts: names 1 columns", "has 4"],
        ),
        ([{"activations": X}], {"chunk": 100}, ["is one chunk", "Lower chunk"]),
        ([{"activations": X}], {"held_out_by": "file"}, ["is one file", "Give more files"]),
    ],
)
def test_what_cannot_be_read(tmp_path, files, options, words):
    message = bad(tmp_path, *files, **options)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("suffix", ["safetensors", "npy"])
@pytest.mark.parametrize("cut", [-100, 5, 0])
def test_a_truncated_file_is_named(tmp_path, suffix, cut):
    path = tmp_path / f"x.{suffix}"
    np.save(path, X.numpy()) if suffix == "npy" else save_file({"activations": X}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UsageError, match=rf"x.{suffix}: is truncated or not a {suffix} file"):
        opened(tmp_path)


def test_other_wrong_files(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    with pytest.raises(UsageError, match=r"^labels: a .npy file holds one array"):
        opened(tmp_path, labels="y")
    save_file({"activations": X}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r".npy and .safetensors files. Name those of one kind"):
        opened(tmp_path)
    for where in (tmp_path / "nowhere.npy", "no_such_thing"):
        with pytest.raises(UsageError, match="there is no such file"):
            opened(where)
    np.save(tmp_path / "objects.npy", np.array([{}, 3], dtype=object))
    with pytest.raises(UsageError, match="objects.npy: is truncated or not"):
        opened(tmp_path / "objects.npy")


def test_a_run_from_a_file(flat):
    table = {
        "source": {"use": "tensors", "data": str(flat), "chunk": 8, "tokens": "ids"},
        "architecture": {"use": "topk", "d_sae": 8, "k": 2},
        "loss": [{"use": "mse"}],
        "analyzer": [{"use": "features", "n_latents": 2}],
        "training": {"tokens": 320, "batch_size": 32, "buffer": 64, "device": "cpu"},
    }
    path = flat / "run.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    summary = saekit.run(path, directory=flat / "run").summary
    assert summary["sae"]["d_in"] == WIDTH and summary["analysis"]["features"]["activations"] > 0
