"""Concept vectors from files and from labelled sequences, and what is refused."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from saekit_contrastive.vectors import concept_columns, read_vectors, vectors_of
from safetensors.torch import save_file

from saekit import SequenceBatch, UsageError

D = 8


class Sequences:
    """A source of sequences [4 positions]: concept 0 adds `direction`, concept 1 is unknown in every third sequence.

    Coordinate 0 is loud and says nothing. Masked positions hold what would spoil every mean."""

    concepts = ("first", "second")

    def __init__(self, one_class: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.directions = torch.nn.functional.normalize(torch.randn(2, D, generator=generator), dim=1)
        self.directions[1] -= self.directions[0] * (self.directions[0] @ self.directions[1])
        self.one_class = one_class
        self.asked = 0

    def sequences(self, split: str, n: int, seed: int, number: int) -> SequenceBatch:
        assert split == "train"
        self.asked += 1
        draws = torch.Generator().manual_seed(100 * seed + number)
        labels = torch.randint(0, 2, (n, 2), generator=draws).float()
        if self.one_class:
            labels[:, 0] = 1.0
        x = 0.3 * torch.randn(n, 4, D, generator=draws) + (labels @ self.directions)[:, None]
        x[..., 0] += 3 * torch.randn(n, 4, generator=draws)
        mask = torch.ones(n, 4, dtype=torch.bool)
        mask[:, 0] = False
        x[:, 0] = 1e6
        labels[::3, 1] = torch.nan
        return SequenceBatch(x, mask, labels, target=x.flip(-1))


@pytest.mark.parametrize("method", ["difference_of_means", "logistic_probe"])
def test_a_planted_direction_is_found_for_each_concept_at_once(method: str) -> None:
    source = Sequences()
    found = vectors_of(source, method, [0, 1], sequences=512, seed=3)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    along = found[:, 1:] @ source.directions[:, 1:].t()  # without the loud coordinate
    along = along / found[:, 1:].norm(dim=1, keepdim=True) / source.directions[:, 1:].norm(dim=1)
    assert (along.diagonal() > 0.97).all(), along


def test_the_probe_looks_past_a_loud_coordinate_that_the_means_keep() -> None:
    """In 32 sequences the means of the loud coordinate differ by chance, more than a probe relies on it."""
    means, probe = (
        vectors_of(Sequences(), method, [0], sequences=32, seed=0)[0, 0].abs()
        for method in ("difference_of_means", "logistic_probe")
    )
    assert probe < 0.5 * means


def test_a_transcoder_gets_directions_of_what_it_rebuilds() -> None:
    read = vectors_of(Sequences(), "difference_of_means", [0], sequences=64, seed=3)
    rebuilt = vectors_of(Sequences(), "difference_of_means", [0], sequences=64, seed=3, output=True)
    torch.testing.assert_close(rebuilt, read.flip(-1))


def test_sequences_are_read_once_for_all_variants_of_a_run() -> None:
    source = Sequences()
    first = vectors_of(source, "difference_of_means", [0], sequences=64, seed=0)
    asked = source.asked
    assert torch.equal(vectors_of(source, "difference_of_means", [0], sequences=64, seed=0), first)
    assert source.asked == asked == 2
    assert not torch.equal(vectors_of(source, "difference_of_means", [0], sequences=64, seed=1), first)


def test_one_class_only_is_refused_with_the_concepts_name() -> None:
    with pytest.raises(UsageError, match=r"fixed_vectors: no labelled sequence that was read has first = 0"):
        vectors_of(Sequences(one_class=True), "difference_of_means", [0], sequences=64, seed=0)


def test_labels_that_are_not_there_are_refused() -> None:
    assert concept_columns(["a", "b"], None) == [0, 1]
    assert concept_columns(["a", "b"], ["b"]) == [1]
    with pytest.raises(UsageError, match=r"concepts: the source has no label 'c'. It has: a, b"):
        concept_columns(["a", "b"], ["c"])
    with pytest.raises(UsageError, match="labelled sequences, but the source has none"):
        concept_columns([], None)


def test_files_of_both_formats_hold_the_same_vectors(tmp_path: Path) -> None:
    vectors = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "v.npy", vectors.numpy())
    save_file({"b": vectors[1:].contiguous(), "a": vectors[0].contiguous()}, tmp_path / "v.safetensors")
    assert torch.equal(read_vectors(tmp_path / "v.npy", D), vectors)
    assert torch.equal(read_vectors(tmp_path / "v.safetensors", D), vectors)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, D + 1), dtype=np.float32), r"width 9, but decoder rows have width 8"),
        (np.array([[1.0] * D, [np.nan] * D]), r"vector 1 contains NaN"),
        (np.zeros((1, D)), r"vector 0 is zero"),
        (np.ones((1, 2, D)), r"shape \(n, 8\)"),
        (np.ones((2, D), dtype=np.int64), r"shape \(n, 8\)"),
        (np.ones((0, D)), r"holds no vector"),
    ],
)
def test_vectors_that_cannot_be_rows_are_refused_with_the_file(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(UsageError, match=rf"fixed_vectors: .*v\.npy.*{message}"):
        read_vectors(tmp_path / "v.npy", D)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "v.safetensors").write_bytes(b"nothing of the kind")
    np.save(tmp_path / "pickled.npy", np.array([types.SimpleNamespace()]), allow_pickle=True)
    (tmp_path / "v.pt").write_bytes(b"")
    for name, message in (
        ("absent.npy", "there is no such file"),
        ("v.safetensors", "cannot be read"),
        ("pickled.npy", "cannot be read"),
        ("v.pt", "Save the vectors as"),
    ):
        with pytest.raises(UsageError, match=message):
            read_vectors(tmp_path / name, D)
