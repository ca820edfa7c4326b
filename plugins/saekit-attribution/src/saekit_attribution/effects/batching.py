"""Samples in batches of one length, with the failures of single samples kept apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from saekit import UsageError, is_out_of_memory
from saekit_attribution.labelled_data.teacher_forcing import Sample

Found = TypeVar("Found")


@dataclass(frozen=True)
class Failed:
    """A sample whose computation failed. error: "OOM" or the exception's type. details: its message."""

    error: str
    details: str


def batches(
    samples: Sequence[Sample], numbers: Sequence[int], batch_tokens: int, *, with_base: bool = False
) -> Iterator[list[int]]:
    """Numbers of samples of equal length, at most `batch_tokens` tokens or a single sample at a time.

    with_base: their base prompts are of equal length too."""
    lengths: dict[tuple[int, int], list[int]] = {}
    for number in numbers:
        sample = samples[number]
        lengths.setdefault((len(sample.tokens), len(sample.base_tokens) if with_base else 0), []).append(number)
    for shape, chosen in sorted(lengths.items()):
        count = math.ceil(len(chosen) / max(1, batch_tokens // max(shape)))
        for part in range(count):  # of one size, rather than a small one at the end
            yield chosen[part * len(chosen) // count : (part + 1) * len(chosen) // count]


def resilient(
    compute: Callable[[list[int]], list[Found]], chosen: list[int], keep: bool
) -> Iterator[tuple[int, Found | Failed]]:
    """The outcomes by number. A batch that runs out of memory is halved; with `keep`, so is one that fails otherwise."""
    problem: Failed | None = None
    try:
        found = compute(chosen)
    except UsageError:
        raise
    except Exception as error:
        short = is_out_of_memory(error)
        if not keep and not (short and len(chosen) > 1):
            raise
        problem = Failed("OOM" if short else type(error).__name__, str(error))
    if problem is None:
        yield from zip(chosen, found, strict=True)
    elif len(chosen) == 1:
        yield chosen[0], problem
    else:  # outside the handler, where the error would keep the batch's tensors alive
        if problem.error == "OOM" and torch.cuda.is_available():
            torch.cuda.empty_cache()
        for half in (chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]):
            yield from resilient(compute, half, keep)
