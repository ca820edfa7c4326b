"""First-party plugins use what everybody may use: the public names of saekit, and no other module of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import saekit
import saekit.organism
import saekit.testing

ROOT = Path(__file__).parents[2]
PUBLIC = {
    *(f"saekit.{name}" for name in saekit.__all__),
    *(f"saekit.organism.{name}" for name in saekit.organism.__all__),
    *(f"saekit.testing.{name}" for name in saekit.testing.__all__),
}
"""See docs/compatibility.md; besides, all of `saekit.protocols`."""
INSIDE = "saekit-bench"
"""It times the internals of saekit, and each release of it requires one release of saekit."""
FILES = sorted(path for path in ROOT.glob("plugins/*/src/**/*.py") if INSIDE not in path.parts)


def imported(path: Path) -> Iterator[str]:
    """What a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_public(name: str) -> bool:
    packages = ("saekit", "saekit.protocols", "saekit.organism", "saekit.testing")
    inside = name.partition(".")[0] == "saekit"
    return not inside or name in PUBLIC or name in packages or name.startswith("saekit.protocols.")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "plugins")))
def test_a_plugin_imports_public_names_alone(path: Path) -> None:
    assert [name for name in imported(path) if not is_public(name)] == []


def test_what_is_public_and_what_is_not() -> None:
    assert all(map(is_public, ["saekit.Result", "saekit.protocols.Loss", "saekit.organism", "torch.nn"]))
    assert not any(map(is_public, ["saekit.files.to_jsonable", "saekit.sae.base.SparseAutoencoder", "saekit.organism.train"]))
