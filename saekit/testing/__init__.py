"""For authors of plugins: conformance checks of every kind of component, and what tests of one need.

Each name is imported when it is first used, so that `saekit.testing.pytest_plugin`, which pytest loads by itself, costs
nothing where it is not used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saekit.testing.checks import checks_of as checks_of
    from saekit.testing.fixtures import make_step as make_step
    from saekit.testing.fixtures import registry_of as registry_of
    from saekit.testing.fixtures import synthetic_truth as synthetic_truth
    from saekit.testing.kit import Check as Check
    from saekit.testing.kit import Failed as Failed
    from saekit.testing.kit import NotApplicable as NotApplicable
    from saekit.testing.kit import Outcome as Outcome
    from saekit.testing.kit import Report as Report
    from saekit.testing.kit import Subject as Subject
    from saekit.testing.running import check as check
    from saekit.testing.running import conformance as conformance
    from saekit.testing.tiny import TinyRun as TinyRun
    from saekit.testing.tiny import tiny_language_run as tiny_language_run
    from saekit.testing.tiny import tiny_run as tiny_run

_HOME = {
    "checks_of": "saekit.testing.checks",
    "make_step": "saekit.testing.fixtures",
    "registry_of": "saekit.testing.fixtures",
    "synthetic_truth": "saekit.testing.fixtures",
    "Check": "saekit.testing.kit",
    "Failed": "saekit.testing.kit",
    "NotApplicable": "saekit.testing.kit",
    "Outcome": "saekit.testing.kit",
    "Report": "saekit.testing.kit",
    "Subject": "saekit.testing.kit",
    "check": "saekit.testing.running",
    "conformance": "saekit.testing.running",
    "TinyRun": "saekit.testing.tiny",
    "tiny_language_run": "saekit.testing.tiny",
    "tiny_run": "saekit.testing.tiny",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saekit.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
