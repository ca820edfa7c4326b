"""`prepared`: made once, by one process; gone on with after a stop; made again if damaged; made each time without a cache."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from saekit import prepared
from saekit.activations.progress import harvest_heard_by

STEPS = 5


def count(directory: Path, stop_after: int | None = None, made_of: int = 0) -> tuple[dict, list[int]]:
    """(what is prepared, the steps that were carried out): the sum of 0 .. 4, saved after each step."""
    done = []

    def make(preparation):
        state = preparation.so_far or {"at": torch.zeros((), dtype=torch.long), "sum": torch.zeros((), dtype=torch.long)}
        at, total = int(state["at"]), int(state["sum"])
        while at < STEPS:
            if len(done) == stop_after:
                raise KeyboardInterrupt
            total += at
            done.append(at)
            at += 1
            preparation.save({"at": torch.tensor(at), "sum": torch.tensor(total)})
            preparation.tell(at, STEPS)
        return {"sum": torch.tensor(total)}

    return prepared("sum", {"seed": made_of}, make, directory=directory), done


def test_it_is_made_once_and_told_to_the_view(tmp_path):
    heard = []
    with harvest_heard_by(lambda done, total: heard.append((done, total))):
        first, steps = count(tmp_path)
    assert int(first["sum"]) == 10 and steps == [0, 1, 2, 3, 4] and heard == [(at, STEPS) for at in range(1, STEPS + 1)]
    again, steps = count(tmp_path)
    assert torch.equal(again["sum"], first["sum"]) and steps == []
    assert count(tmp_path, made_of=1)[1] == [0, 1, 2, 3, 4]  # of something else
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_after_a_stop_it_goes_on(tmp_path, stop_after):
    with pytest.raises(KeyboardInterrupt):
        count(tmp_path, stop_after)
    found, steps = count(tmp_path)
    assert int(found["sum"]) == 10 and steps == list(range(stop_after, STEPS))


@pytest.mark.parametrize("kind", ["partial", "safetensors"])
def test_what_is_damaged_is_made_again(tmp_path, kind):
    if kind == "partial":
        with pytest.raises(KeyboardInterrupt):
            count(tmp_path, 3)
    else:
        count(tmp_path)
    (path,) = tmp_path.glob(f"*.{kind}")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found, steps = count(tmp_path)
    assert int(found["sum"]) == 10 and steps == [0, 1, 2, 3, 4]


def test_without_a_place_to_write_it_is_made_each_time(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    for _ in range(2):
        found, steps = count(blocked / "cache")
        assert int(found["sum"]) == 10 and steps == [0, 1, 2, 3, 4]


def test_an_error_of_the_maker_is_raised(tmp_path):
    def fails(preparation):
        raise ZeroDivisionError("by the maker")

    with pytest.raises(ZeroDivisionError):
        prepared("fails", {}, fails, directory=tmp_path)


def _slowly(directory: Path, marks: Path) -> None:
    def make(preparation):
        (marks / f"{os.getpid()}").write_text("")
        time.sleep(0.3)
        return {"x": torch.ones(2)}

    assert prepared("slow", {}, make, directory=directory)["x"].sum() == 2


def test_of_several_processes_one_makes_it(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_slowly, args=(tmp_path, marks)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0] and len(list(marks.iterdir())) == 1


def test_only_the_newest_are_kept(tmp_path):
    for seed in range(7):
        count(tmp_path, made_of=seed)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
