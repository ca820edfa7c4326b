"""What counts as a lack of memory, on a device and on the machine, and work that is halved until it fits."""

from collections.abc import Sequence

import pytest
import torch

from saekit import in_parts_that_fit, is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),  # somebody's own words
        (None, False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: BaseException | None, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_work_is_halved_until_it_fits_and_keeps_its_order() -> None:
    tried: list[list[int]] = []

    def run(items: Sequence[int]) -> list[int]:
        tried.append(list(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(items)

    assert list(in_parts_that_fit(run, range(5))) == [[0, 1], [2], [3, 4]]
    assert tried == [[0, 1, 2, 3, 4], [0, 1], [2, 3, 4], [2], [3, 4]]


@pytest.mark.parametrize(("error", "items"), [(MemoryError(), [1]), (ValueError("shapes"), [1, 2])])
def test_what_halving_cannot_mend_is_raised(error: Exception, items: list[int]) -> None:
    def run(items: Sequence[int]) -> None:
        raise error

    with pytest.raises(type(error)):
        list(in_parts_that_fit(run, items))
