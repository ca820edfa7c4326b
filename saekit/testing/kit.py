"""A conformance check, the component under check, and the outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saekit.plugins import Registry
from saekit.registered import RegisteredComponent


class Failed(Exception):
    """A component does not do what a check asks. The message says what it does instead, and the fix."""


class NotApplicable(Exception):
    """A check does not apply to this component, or cannot be made here. The message says why."""


@dataclass(frozen=True)
class Subject:
    """One component under check.

    options: as the user gave them, checked and completed.
    registry: provides what it needs.
    place: an empty directory that is removed afterwards.
    """

    component: RegisteredComponent
    options: dict[str, Any]
    registry: Registry
    place: Path

    def build(self, *args: Any) -> Any:
        """A new instance of the component, built with torch's seed 0, so that two of them are equal."""
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

    name: what reports and `expected` call it.
    summary: what it asks, in a sentence.
    function: raises `Failed`, or `NotApplicable`, or returns.
    """

    name: str
    summary: str
    function: Callable[[Subject], None]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check. status: "passed", "failed", "expected" (it failed as expected), or "skipped"."""

    check: str
    status: str
    message: str = ""


@dataclass(frozen=True)
class Report:
    """The outcomes of all checks of one component."""

    component: RegisteredComponent
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every check passed, was skipped, or failed as expected."""
        return not self.failures

    @property
    def failures(self) -> list[Outcome]:
        """The outcomes that failed."""
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
    """Make one check of one component; `expected` gives the reason for each expected failure."""
    reason = expected.get(check.name)
    try:
        check.function(subject)
    except NotApplicable as error:
        return Outcome(check.name, "skipped", str(error))
    except Failed as error:
        message = str(error)
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {error}{_place_of(error)}"
    else:
        if reason is None:
            return Outcome(check.name, "passed")
        return Outcome(check.name, "failed", f"it passes, but was expected to fail ({reason}). Take it out of `expected`.")
    return Outcome(check.name, "failed", message) if reason is None else Outcome(check.name, "expected", reason)


def _place_of(error: BaseException) -> str:
    """Where an error was raised: the innermost line outside installed packages."""
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def refuse_unknown(expected: Iterable[str], checks: Iterable[Check]) -> None:
    """UsageError for an expected failure of a check that does not exist."""
    from saekit.errors import UsageError, near_names

    names = [check.name for check in checks]
    for name in expected:
        if name not in names:
            raise UsageError(f"expected: there is no check {name!r}.{near_names(name, names)} There are: {', '.join(names)}.")
