"""The source `pushed`: the newest rows are held, each is drawn once a pass, and what it takes in memory is said before."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.activations.shuffle import ShuffledBatches
from saekit.builtin.sources import PushedSource
from saekit.errors import OptionError, UsageError

CPU = torch.device("cpu")


def opened(rows: int = 12, **options) -> PushedSource:
    source = PushedSource(d_in=2, rows=rows, **options)
    source.open(device=CPU, dtype=torch.float32)
    return source


def numbered(first: int, n: int) -> torch.Tensor:
    """Rows whose first coordinate says their number."""
    return torch.stack([torch.arange(first, first + n).float(), torch.zeros(n)], 1)


def numbers(x: torch.Tensor) -> list[int]:
    return [int(value) for value in x[:, 0]]


_PASSES = itertools.count(1000)


def whole(source: PushedSource) -> list[int]:
    """What is held, by place: as a pass that begins now sees it."""
    return numbers(next(source.blocks("train", size=source.rows, seed=0, start=next(_PASSES))).x)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 20), sizes=st.lists(st.integers(0, 45), max_size=12))
def test_the_newest_rows_are_held_each_at_its_place(rows: int, sizes: list[int]) -> None:
    source, pushed = opened(rows), []
    for size in sizes:
        source.push(numbered(len(pushed), size), held_out=False)
        pushed += range(len(pushed), len(pushed) + size)
        newest = pushed[-rows:]
        assert source.held == len(newest)
        if newest:
            assert sorted(whole(source)) == newest
    if max(sizes, default=0) <= rows:  # a longer push overtakes itself
        for number in pushed[-rows:]:
            assert whole(source)[number % rows] == number


def batches(source: PushedSource, size: int, **options) -> ShuffledBatches:
    return ShuffledBatches(source, batch_size=size, block_size=source.rows, seed=0, **options)


def test_every_place_is_drawn_once_in_a_pass_and_gives_what_it_holds_then() -> None:
    source = opened(12)
    source.push(numbered(0, 12), held_out=False)
    drawn = batches(source, 4)
    first = [numbers(next(drawn).x) for _ in range(3)]
    assert sorted(itertools.chain(*first)) == list(range(12))
    second = numbers(next(drawn).x)
    source.push(numbered(12, 12), held_out=False)  # all that it holds is new
    rest = [numbers(next(drawn).x) for _ in range(2)]
    assert sorted([*second, *(number - 12 for number in itertools.chain(*rest))]) == list(range(12))
    assert first[0] != second


def test_each_row_is_as_likely_to_be_drawn_as_any_other() -> None:
    """While rows come as fast as they are drawn, each is drawn once on average, whatever its place."""
    source, counts = opened(64), torch.zeros(64 * 41)
    source.push(numbered(0, 64), held_out=False)
    drawn, pushed = batches(source, 8), 64
    while pushed < len(counts):
        counts[next(drawn).x[:, 0].long()] += 1
        source.push(numbered(pushed, 8), held_out=False)
        pushed += 8
    inner = counts[64:-64]  # those that were in the buffer from beginning to end
    assert abs(float(inner.mean()) - 1) < 0.02
    by_place = inner.view(-1, 64).mean(0)
    assert float(by_place.min()) > 0.6 and float(by_place.max()) < 1.4  # 39 rows each, standard error 0.1


def test_a_sample_is_of_different_rows_and_the_same_for_the_same_number() -> None:
    source = opened(100)
    source.push(numbered(0, 60), held_out=False)
    samples = [numbers(block.x) for block in itertools.islice(source.blocks("train", size=20, seed=3), 4)]
    assert all(len(set(sample)) == 20 for sample in samples)
    assert len({tuple(sample) for sample in samples}) == 4
    assert numbers(next(source.blocks("train", size=20, seed=3, start=2)).x) == samples[2]
    assert numbers(next(source.blocks("train", size=20, seed=4)).x) != samples[0]


def test_some_pushes_are_held_out_whole() -> None:
    source = opened(1000, held_out=0.25)
    for number in range(40):
        source.push(numbered(number * 10, 10))
    held_out = {n for block in source.blocks("held_out", size=16, seed=0) for n in numbers(block.x)}
    assert held_out == {push * 10 + row for push in range(1, 40, 4) for row in range(10)}
    assert not held_out & set(whole(source))
    assert source.held == 300


def test_its_bytes_are_said_before_and_are_those_it_takes() -> None:
    source = PushedSource(d_in=512)
    assert source.rows == 819_200 and source.bytes == 819_200 * 1.05 * 512 * 4
    assert "819,200 rows, and 40,960 held out, takes 1,761.6 MB on the device" in source.peek()["data"]
    small = opened(64, place="host")
    storages = [small._train.storage, small._held_out.storage]
    assert small.bytes == sum(storage.untyped_storage().nbytes() for storage in storages)
    assert "on the host" in small.peek()["data"]


def test_steps_are_due_every_so_often_once_it_is_filled() -> None:
    source = opened(12, every=3, fill=4)
    due = []
    for number in range(12):
        if number == 5:
            source.push(numbered(0, 4), held_out=False)
        due.append(source.due())
    assert [i + 1 for i, one in enumerate(due) if one] == [6, 9, 12]


@pytest.mark.parametrize("keep", [False, True])
def test_what_it_takes_back(keep: bool) -> None:
    source = opened(12, keep=keep, held_out=0.5)
    for number in range(7):
        source.push(numbered(number * 5, 5))
        source.due()
    drawn = batches(source, 5)
    next(drawn)
    state = source.state_dict()
    assert ("train" in state) == keep
    other = opened(12, keep=keep, held_out=0.5)
    other.load_state_dict({key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()})
    assert other.held == (12 if keep else 0)
    for one in (source, other):
        one.push(numbered(99, 5))  # the turn of the held-out split goes on
    assert (99 in whole(other) if other.held else False) == (99 in whole(source)) is False
    if keep:
        assert whole(other) == whole(source)
        again = batches(other, 5, position=drawn.position)
        assert [numbers(next(again).x) for _ in range(5)] == [numbers(next(drawn).x) for _ in range(5)]


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"fill: 13 .* 12 rows"):
        opened(12, fill=13)
    with pytest.raises(UsageError, match="'test'"):
        next(opened().blocks("test", size=4, seed=0))

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(OptionError, match="rows: a buffer of 0.00 GB does not fit on cpu. Lower rows"):
        opened()
