"""Shuffled batches: nothing lost, restartable anywhere, and a background thread that is never left behind."""

import gc
import threading
import time
import traceback

import pytest
import torch

from saekit.activations.batch import Activations
from saekit.activations.shuffle import ShuffledBatches, stop_point


class Numbers:
    """Blocks of 17, 5, 23, ... consecutive numbers."""

    def __init__(self, blocks=None, fail_at=None, slow=0.0):
        self.sizes = [17, 5, 23, 1, 40]
        self.end, self.fail_at, self.slow = blocks, fail_at, slow
        self.made = 0
        self.failed = threading.Event()

    def blocks(self, split, *, size, seed, start=0):
        assert split == "train"
        number = start
        while self.end is None or number < self.end:
            if number == self.fail_at:
                self.failed.set()
                raise ValueError(f"block {number} cannot be had")
            for _ in range(int(self.slow / 0.01)):
                stop_point()
                time.sleep(0.01)
            first = sum(self.sizes[i % 5] for i in range(number))
            values = torch.arange(first, first + self.sizes[number % 5])
            self.made += 1
            yield Activations(values[:, None].float().expand(-1, 3), tokens=values)
            number += 1


def batches(source=None, **options):
    options = {"batch_size": 8, "block_size": 0, "seed": 0} | options
    return ShuffledBatches(source or Numbers(), **options)


def harvest_threads():
    return [thread for thread in threading.enumerate() if thread.name == "saekit-harvest"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert not harvest_threads()


def taken(iterator, n):
    found = []
    for _ in range(n):
        batch = next(iterator)
        assert len(batch) == 8 and torch.equal(batch.x[:, 0], batch.tokens.float())
        found.append((batch.tokens.tolist(), iterator.position))
    return found


def test_every_activation_comes_once_in_an_order_of_its_own():
    with batches(Numbers(blocks=5)) as some:
        rows = [row for batch in some for row in batch.tokens.tolist()]
    assert len(rows) == 80 and len(set(rows)) == 80 and set(rows) <= set(range(86))  # 86 % 8 rows are left over
    assert set(rows[:17]) == set(range(17)) and rows[:17] != sorted(rows[:17])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_restart_at_any_position_goes_on_with_the_same_batches(prefetch):
    with batches(prefetch=prefetch) as some:
        run = taken(some, 25)
    for i in range(24):
        with batches(prefetch=prefetch, position=run[i][1]) as again:
            assert taken(again, min(6, 24 - i)) == run[i + 1 : i + 7]


def test_prefetch_changes_nothing():
    runs = []
    for prefetch in (0, 1, 3):
        with batches(prefetch=prefetch) as some:
            runs.append(taken(some, 40))
    assert runs[0] == runs[1] == runs[2]


def test_seeds_give_other_orders():
    with batches(seed=0) as one, batches(seed=1) as other:
        assert taken(one, 2)[0][0] != taken(other, 2)[0][0]


def test_the_position_counts_what_was_consumed():
    with batches(prefetch=3) as some:
        assert some.position == (0, 0)
        assert [position for _, position in taken(some, 4)] == [(0, 8), (0, 16), (2, 2), (2, 10)]


@pytest.mark.parametrize("prefetch", [1, 2])
def test_no_more_blocks_are_held_than_said(prefetch):
    source = Numbers()
    with batches(source, prefetch=prefetch) as some:
        next(some)
        time.sleep(0.1)
        assert source.made == 1 + prefetch


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_an_exception_of_the_source_reaches_the_consumer_with_its_traceback(prefetch):
    some = batches(Numbers(fail_at=3), prefetch=prefetch)
    with pytest.raises(ValueError, match="block 3 cannot be had") as caught:
        taken(some, 100)
    assert "in blocks" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert not harvest_threads()
    with pytest.raises((ValueError, StopIteration)):  # and again, rather than waiting for ever
        taken(some, 100)


def test_closing_is_prompt_while_a_block_is_under_way():
    some = batches(Numbers(slow=0.3), prefetch=1)
    next(some)
    time.sleep(0.05)
    start = time.monotonic()
    some.close()
    assert time.monotonic() - start < 0.15 and not harvest_threads()
    some.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(some)


def test_an_exception_of_the_consumer_closes_and_so_does_forgetting():
    with pytest.raises(ZeroDivisionError), batches(prefetch=2) as some:
        len(next(some)) / 0
    assert not harvest_threads()
    some = batches(prefetch=2)
    next(some)
    assert harvest_threads()
    del some
    gc.collect()
    assert not harvest_threads()


def test_a_finite_source_ends():
    for prefetch in (0, 2):
        with batches(Numbers(blocks=2), prefetch=prefetch) as some:
            assert len(list(some)) == 22 // 8
            assert list(some) == []
