"""The checks of a metric, on held-out batches of a finished tiny run."""

from __future__ import annotations

import inspect
import math
import sys
import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from saekit.estimate import Estimate
from saekit.runner.context import RunContext
from saekit.testing.checks import any_kind
from saekit.testing.checks.shared import changed, copied, seeded
from saekit.testing.kit import Check, Failed, NotApplicable, Subject
from saekit.testing.tiny import finished_run

_ROWS, _PIECES = 96, (32, 1, 17, 46)
_FEW, _MANY = 3, 30


def context_of(subject: Subject) -> RunContext:
    """The context of a finished run that provides what the metric needs."""
    return finished_run(subject.component.needs, subject.registry).context


def ready(subject: Subject) -> Any:
    """The metric, built and prepared."""
    metric = subject.build()
    if not (hasattr(metric, "update") and hasattr(metric, "compute")) and not hasattr(metric, "measure"):
        raise Failed("it has neither update(step) and compute() nor measure(context). Implement one or the other.")
    if hasattr(metric, "prepare"):
        metric.prepare(context_of(subject))
    return metric


def streaming(subject: Subject) -> Any:
    """A metric that streams, ready. NotApplicable for one that measures with the model."""
    metric = ready(subject)
    if not hasattr(metric, "update"):
        raise NotApplicable("it measures with the model (`measure`) and does not take a stream.")
    return metric


def batches(subject: Subject, sizes: Iterable[int], start: int = 0) -> Iterable[Any]:
    """Held-out steps of these sizes, one after the other."""
    context = context_of(subject)
    rows = next(context.source.blocks("held_out", size=4 * _ROWS, seed=0))
    with torch.no_grad():
        for size in sizes:
            yield context.step(rows.rows(slice(start, start + size)))
            start += size


def values_of(subject: Subject, sizes: Iterable[int] = (_ROWS,), start: int = 0) -> dict[str, Any]:
    """What it computes for a stream, or measures."""
    metric = ready(subject)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), seeded(0):
        torch.manual_seed(0)
        if not hasattr(metric, "update"):
            return metric.measure(context_of(subject))
        for step in batches(subject, sizes, start):
            metric.update(step)
        return metric.compute()


def number_of(value: Any) -> float | None:
    """A value as a number, without what an `Estimate` has beside it; None if it is not defined."""
    value = value.value if isinstance(value, Estimate) else value
    number = None if value is None else float(value)
    return None if number is None or math.isnan(number) else number


# --- the checks ------------------------------------------------------------------------------------------------


def plain_numbers(subject: Subject) -> None:
    values = values_of(subject)
    if not isinstance(values, dict) or not values:
        raise Failed(f"it gives {type(values).__name__} {values!r}. Return a dictionary of named numbers.")
    for name, value in values.items():
        plain = value.value if isinstance(value, Estimate) else value
        if not isinstance(name, str) or not (plain is None or isinstance(plain, int | float)):
            what = f"the value of an Estimate, {type(plain).__name__}" if isinstance(value, Estimate) else type(plain).__name__
            raise Failed(f"{name!r} is {what}. Names are texts and values plain: float(...), or None.")


def estimates_hold(subject: Subject) -> None:
    given = {name: value for name, value in values_of(subject).items() if isinstance(value, Estimate)}
    if not given:
        raise NotApplicable("it gives plain numbers, without an interval or a note beside them.")
    for name, estimate in given.items():
        value, ends = estimate.value, estimate.interval
        if ends is not None:
            if len(ends) != 2 or not all(isinstance(end, int | float) and math.isfinite(end) for end in ends):
                raise Failed(f"the interval of {name!r} is {ends!r}. Give two numbers, or None.")
            if value is None or not ends[0] <= value <= ends[1]:
                raise Failed(f"{name!r} is {value} and its interval {ends[0]:g} to {ends[1]:g}. The value must lie in it.")
        if not all(isinstance(what, str) and isinstance(n, int) and n >= 0 for what, n in estimate.n.items()):
            raise Failed(f"`n` of {name!r} is {dict(estimate.n)!r}. Give how many there are of what, as whole numbers.")
        if not isinstance(estimate.note, str):
            raise Failed(f"the note of {name!r} is {type(estimate.note).__name__}. Give a sentence, or an empty text.")


def whole_or_in_pieces(subject: Subject) -> None:
    streaming(subject)
    whole, pieces = values_of(subject), values_of(subject, _PIECES)
    assert sum(_PIECES) == _ROWS
    for name in {**whole, **pieces}:
        a, b = number_of(whole.get(name)), number_of(pieces.get(name))
        if (a is None) != (b is None) or (a is not None and b is not None and not math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6)):
            raise Failed(
                f"{name} is {a} for {_ROWS} rows at once and {b} for the same rows in batches of {_PIECES}. Keep sums and "
                "counts, and divide in compute; the mean of the batches' means is a different number."
            )


def names_and_meanings(subject: Subject) -> None:
    metric = ready(subject)
    names = set(values_of(subject))
    others = set(values_of(subject, (16,), start=_ROWS))
    if names != others:
        raise Failed(f"{sorted(names ^ others)[0]!r} is returned for one stream and not for another. Give None if undefined.")
    meanings = getattr(metric, "meanings", {})
    for name in sorted(names - set(meanings)):
        raise Failed(f"{name!r} has no line in `meanings`. Say there what it means; the report shows it.")
    for name in sorted(set(meanings) - names):
        raise Failed(f"`meanings` explains {name!r}, which it does not return. Remove the line, or correct the name.")
    for name in getattr(metric, "headline", ()):
        if name not in names:
            raise Failed(f"`headline` names {name!r}, which it does not return. Correct the name.")


def deterministic(subject: Subject) -> None:
    what = changed(values_of(subject), values_of(subject))
    if what:
        raise Failed(f"{what} differs the second time, for the same stream. Draw from a generator seeded with context.seed.")


def inputs_unchanged(subject: Subject) -> None:
    metric, context = ready(subject), context_of(subject)
    before = copied(context.sae.state_dict()), context.sae.training
    if not hasattr(metric, "update"):
        with torch.no_grad():
            metric.measure(context)
    else:
        (step,) = batches(subject, (_ROWS,))
        was = copied(step)
        with torch.no_grad():
            metric.update(step)
            metric.compute()
        what = changed(was, copied(step))
        if what:
            raise Failed(f"it changes step.{what} in place. Every metric is given the same step: work on a copy.")
    now = copied(context.sae.state_dict()), context.sae.training
    if changed(before[0], now[0]) or before[1] != now[1]:
        raise Failed("it changes the SAE. Measure, and leave it as it is.")


def bounded_memory(subject: Subject) -> None:
    metric = streaming(subject)
    (step,) = batches(subject, (_ROWS,))
    sizes = []
    with torch.no_grad():
        for number in range(1, _MANY + 1):
            metric.update(step)
            if number in (_FEW, _MANY):
                sizes.append(size_of(metric))
    if sizes[1] > sizes[0]:
        raise Failed(
            f"it holds {sizes[0]} bytes after {_FEW} batches and {sizes[1]} after {_MANY}: it keeps something of each. Keep "
            "sums, counts or a histogram instead."
        )


def size_of(value: Any, seen: set[int] | None = None) -> int:
    """About how many bytes an object holds: its tensors, arrays, containers and attributes."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, type | types.ModuleType) or inspect.isroutine(value):
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if isinstance(value, dict):
        return 8 * len(value) + sum(size_of(inner, seen) for pair in value.items() for inner in pair)
    if isinstance(value, list | tuple | set):
        return 8 * len(value) + sum(size_of(inner, seen) for inner in value)
    if hasattr(value, "__dict__"):
        return sum(size_of(inner, seen) for inner in vars(value).values())
    # A number may take more bytes as it grows; that does not count.
    return 0 if isinstance(value, int | float) else sys.getsizeof(value)


def empty_stream(subject: Subject) -> None:
    metric = streaming(subject)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics says that there was no update
            values = metric.compute()
    except ValueError as error:  # an error of torch or Python is not an answer
        if str(error):
            return
        raise
    told = {name: number_of(value) for name, value in values.items()}
    wrong = [name for name, number in told.items() if number is not None]
    if wrong:
        raise Failed(
            f"{wrong[0]} is {told[wrong[0]]} where nothing was measured. Give None for what is not defined, or raise a "
            "ValueError that says so."
        )


CHECKS: tuple[Check, ...] = (
    *any_kind.CHECKS,
    Check("plain_numbers", "It gives a dictionary of plain numbers, None if one is not defined.", plain_numbers),
    Check("whole_or_in_pieces", "The same rows in other batches give the same values.", whole_or_in_pieces),
    Check(
        "estimates_hold",
        "An `Estimate` lies in its interval, and says what it was measured on in whole numbers.",
        estimates_hold,
    ),
    Check(
        "names_and_meanings",
        "It always gives the same names, each with its line in `meanings`; `headline` names some of them.",
        names_and_meanings,
    ),
    Check("deterministic", "The same stream gives the same values.", deterministic),
    Check("inputs_unchanged", "It changes neither the step nor the SAE.", inputs_unchanged),
    Check("bounded_memory", "What it holds does not grow with the number of batches.", bounded_memory),
    Check("empty_stream", "Without any batch it gives None or NaN, or a ValueError that says so.", empty_stream),
)
