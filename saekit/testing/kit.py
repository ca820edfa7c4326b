"""What a conformance check is, what it is given, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saekit.component import Component
from saekit.plugins import Registry


class Failed(Exception):
    """A component does not do what a check asks. The message says what it does instead, and the fix."""


class NotApplicable(Exception):
    """A check has nothing to ask of this component, or cannot ask it here. The message says why."""


@dataclass(frozen=True)
class Subject:
    """One component under check.

    options: as the user gave them, checked and completed. registry: what its needs are provided from. place: an empty
    directory that is removed afterwards.
    """

    component: Component
    options: dict[str, Any]
    registry: Registry
    place: Path

    def build(self, *args: Any) -> Any:
        """The component at work, made anew from torch's seed 0, so that two of them begin alike."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.component.build(self.options, *args)

    def needs(self, what: str) -> bool:
        """Whether the component declares that it needs `what`."""
        return what in self.component.needs


@dataclass(frozen=True)
class Check:
    """One question asked of every component of a kind.

    name: what reports and `expected` call it. summary: what it asks, in a sentence. function: raises `Failed`, or
    `NotApplicable`, or returns.
    """

    name: str
    summary: str
    function: Callable[[Subject], None]


@dataclass(frozen=True)
class Outcome:
    """What came of one check. status: "passed", "failed", "expected" (it fails, as was said), or "skipped"."""

    check: str
    status: str
    message: str = ""


@dataclass(frozen=True)
class Report:
    """The outcomes of all checks of one component."""

    component: Component
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no check failed that was not expected to."""
        return not self.failures

    @property
    def failures(self) -> list[Outcome]:
        """The outcomes that are not as they should be."""
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "kind": self.component.kind,
            "name": self.component.name,
            "qualified_name": self.component.qualified_name,
            "distribution": self.component.distribution,
            "version": self.component.version,
            "ok": self.ok,
            "checks": [vars(outcome) for outcome in self.outcomes],
        }

    def __str__(self) -> str:
        lines = [self.component.origin]
        for outcome in self.outcomes:
            lines.append(f"  {outcome.status:<8} {outcome.check}{': ' + outcome.message if outcome.message else ''}")
        return "\n".join(lines)


def carry_out(check: Check, subject: Subject, expected: Mapping[str, str]) -> Outcome:
    """One check of one component; `expected` gives the reason of each failure that is to be."""
    reason = expected.get(check.name)
    try:
        check.function(subject)
    except NotApplicable as error:
        return Outcome(check.name, "skipped", str(error))
    except Failed as error:
        message = str(error)
    except Exception as error:
        message = f"{type(error).__name__}: {error}{_place_of(error)}"
    else:
        if reason is None:
            return Outcome(check.name, "passed")
        return Outcome(check.name, "failed", f"it passes, but was expected to fail ({reason}). Take it out of `expected`.")
    return Outcome(check.name, "failed", message) if reason is None else Outcome(check.name, "expected", reason)


def _place_of(error: BaseException) -> str:
    """Where in somebody's code an error was raised: the innermost line that is not of torch."""
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def refuse_unknown(expected: Iterable[str], checks: Iterable[Check]) -> None:
    """UsageError for an expected failure of a check that there is none of: it would excuse nothing."""
    from saekit.errors import UsageError, near_names

    names = [check.name for check in checks]
    for name in expected:
        if name not in names:
            raise UsageError(f"expected: there is no check {name!r}.{near_names(name, names)} There are: {', '.join(names)}.")
