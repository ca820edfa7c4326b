"""Fixtures for tests of plugins, which pytest finds if saekit is installed. They import nothing unless used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def saekit_step() -> Any:
    """Makes a `Step`: `saekit_step(batch=1, labels=True)`; see `saekit.testing.make_step`."""
    from saekit.testing import make_step

    return make_step


@pytest.fixture
def saekit_registry() -> Any:
    """Makes a registry with your own components; see `saekit.testing.registry_of`."""
    from saekit.testing import registry_of

    return registry_of


@pytest.fixture
def saekit_truth() -> Any:
    """Activations made of known directions; see `saekit.testing.synthetic_truth`."""
    from saekit.testing import synthetic_truth

    return synthetic_truth()


@pytest.fixture
def saekit_tiny_run(tmp_path: Path) -> Any:
    """A finished run that took a second, with its `directory`, `summary` and `context`; see `saekit.testing.tiny_run`."""
    from saekit.testing import tiny_run

    return tiny_run(tmp_path / "saekit_tiny_run")
