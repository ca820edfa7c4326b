"""What counts as a lack of memory, on a device and on the machine."""

import pytest
import torch

from saekit import is_out_of_memory


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
