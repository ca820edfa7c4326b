"""Ways to run the checks: by hand, and as one parametrised test. A third is the command `saekit check`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from saekit.errors import PluginError
from saekit.plugins import Registry
from saekit.testing.checks import checks_of
from saekit.testing.kit import Check, Outcome, Report, Subject, carry_out, refuse_unknown

Options = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


def check(
    kind: str,
    name: str,
    *,
    options: Options | None = None,
    expected: Mapping[str, str] | None = None,
    registry: Registry | None = None,
) -> Report:
    """Run every check of its kind on one component.

    options: as a run file would give them, or a function that makes them.
    expected: for each check that this component may fail, the reason.
    registry: where the component is found; by default among what is installed.

    UsageError for an unknown name, option or expected check.
    """
    expected, checks = expected or {}, checks_of(kind)
    refuse_unknown(expected, checks)
    registry = registry or Registry()
    outcomes = [outcome_of(each, kind, name, options, expected, registry) for each in checks]
    return Report(registry.find(kind, name), outcomes)


def conformance(
    kind: str, name: str, *, options: Options | None = None, expected: Mapping[str, str] | None = None
) -> Callable[..., None]:
    """A test for pytest that runs every check of its kind on one installed component, each as a separate test.

        test_conformance = saekit.testing.conformance("loss", "hoyer", expected={"batch_of_one": "it compares rows"})

    The arguments are those of `check`. An expected failure is reported as xfail with its reason.
    """
    import pytest

    known, checks = dict(expected or {}), checks_of(kind)
    refuse_unknown(known, checks)

    @pytest.mark.parametrize("asked", [pytest.param(each, id=each.name) for each in checks])
    def test_conformance(asked: Check) -> None:
        registry = Registry()
        outcome = outcome_of(asked, kind, name, options, known, registry)
        if outcome.status == "skipped":
            pytest.skip(outcome.message)
        if outcome.status == "expected":
            pytest.xfail(outcome.message)
        if outcome.status == "failed":
            pytest.fail(f"{registry.find(kind, name).origin}: {outcome.check}: {outcome.message}", pytrace=False)

    return test_conformance


def outcome_of(
    asked: Check, kind: str, name: str, options: Options | None, expected: Mapping[str, str], registry: Registry
) -> Outcome:
    """One check of one component; the arguments are those of `check`."""
    component = registry.find(kind, name)
    given = options() if callable(options) else options or {}
    # A recipe's options are a whole run file.
    try:
        checked = {} if kind == "recipe" else component.validate(given, f"{kind}.{name}")
    except PluginError:  # its options cannot even be read, which `options_documented` reports
        checked = dict(given)
    with tempfile.TemporaryDirectory(prefix="saekit-check-") as place:
        return carry_out(asked, Subject(component, checked, registry, Path(place)), expected)
