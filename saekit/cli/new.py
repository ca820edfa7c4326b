"""`saekit new`: a small package around one component, which works as it is written."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import tempfile
from pathlib import Path
from string import Template

import click

from saekit.compatibility import CONTRACT
from saekit.errors import UsageError
from saekit.kinds import KINDS, article
from saekit.plugins import Registry
from saekit.registered import OWN_DISTRIBUTION
from saekit.terminal.output import echo

TEMPLATES = Path(__file__).parent / "templates"
KINDS_WITH_TEMPLATES = tuple(kind for kind in KINDS if kind != "recipe")  # a recipe is a file, not code
# Narrower than the registry's rule: it becomes the names of a distribution, of a module and of a class as well.
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


@click.command("new")
@click.argument("kind", type=click.Choice([kind.replace("_", "-") for kind in KINDS_WITH_TEMPLATES]))
@click.argument("name")
@click.option("--dir", "parent", default=".", metavar="DIR", help="Where the package's folder is made; here by default.")
def command(kind: str, name: str, parent: str) -> None:
    """Write a package around one component that works: its code, a test, a run file, a README.

    NAME is what a run file will say after `use =`: lower case, digits, underscores. The package is saekit-NAME.
    """
    kind, name = kind.replace("-", "_"), _checked(name)
    _refuse_taken(name, Registry())
    directory = write_package(kind, name, Path(parent))
    echo(f"{directory} holds {article(kind)} that works: src/saekit_{name}/{kind}.py. Next:\n")
    echo(f"  pip install -e {shlex.quote(str(directory))}")
    echo(f"  saekit check {name}")
    echo(f"  saekit run {shlex.quote(str(directory / 'run.toml'))}")


def _checked(name: str) -> str:
    """`name` with underscores for dashes. UsageError if it is not a valid name."""
    turned = name.replace("-", "_")
    if not _NAME.fullmatch(turned):
        raise UsageError(
            f"{name!r} is not a name for a component. Use lower case, digits and single underscores, beginning with a letter: "
            "my_sparsity."
        )
    if turned.startswith("saekit_"):
        raise UsageError(f"{name!r}: the package will be called saekit-NAME anyway. Give the name without saekit-.")
    return turned


def _refuse_taken(name: str, registry: Registry) -> None:
    """UsageError if the new component would override another, or if `saekit check NAME` would be ambiguous."""
    for component in registry.components():
        if component.name == name:
            raise UsageError(f"{name!r} is taken: there is the {component.origin}. Choose another name.")
    for plugin in registry.plugins:
        if plugin.name == name:
            raise UsageError(
                f"{name!r} is taken: plugin {name!r} comes with {plugin.distribution} {plugin.version}. Choose another name."
            )


def write_package(kind: str, name: str, parent: Path) -> Path:
    """Write the package of a component below `parent`, and return its folder. It appears whole or not at all.

    Raises UsageError if the folder exists or cannot be written."""
    directory = parent / f"saekit-{name.replace('_', '-')}"
    if directory.exists() or directory.is_symlink():
        raise UsageError(f"{directory} exists already. Choose another name, or another place with --dir.")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saekit-new-", dir=parent) as place:
            draft = Path(place) / directory.name
            for path, text in package_files(kind, name).items():
                file = draft / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            draft.rename(directory)
    except OSError as error:
        raise UsageError(f"{directory} cannot be written: {error}. Choose another place with --dir.") from error
    return directory


def package_files(kind: str, name: str) -> dict[str, str]:
    """What the package of a component consists of: texts by their paths in it."""
    words = {
        "kind": kind,
        "word": kind.replace("_", " "),
        "name": name,
        "dashed": name.replace("_", "-"),
        "class_name": "".join(part.capitalize() for part in [*name.split("_"), *kind.split("_")]),
        "contract": str(CONTRACT),
        "version": importlib.metadata.version(OWN_DISTRIBUTION),
    }
    shared, own = TEMPLATES / "package", TEMPLATES / kind
    package = f"src/saekit_{name}"
    places = {
        "pyproject.toml": shared / "pyproject.toml.txt",
        "README.md": shared / "README.md.txt",
        f"tests/test_{name}.py": shared / "test.py.txt",
        f"{package}/__init__.py": own / "__init__.py.txt",
        f"{package}/{kind}.py": own / f"{kind}.py.txt",
        "run.toml": own / "run.toml.txt",
    }
    # `substitute` raises for a word that is not among these, so that none can be left in a file.
    return {path: Template(file.read_text(encoding="utf-8")).substitute(words) for path, file in places.items()}
