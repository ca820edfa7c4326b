"""`saekit new`: what it writes installs, keeps to the contract, passes its own test and works in a run, without one edit."""

from __future__ import annotations

import ast
import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from environments import OUTSIDE, ROOT, Environment
from helpers import Outcome, python

import saekit
from saekit.cli.new import KINDS_WITH_TEMPLATES, package_files
from saekit.kinds import KINDS

NAMES = {kind: f"my_{kind}_2" for kind in KINDS_WITH_TEMPLATES}
Command = Callable[..., Outcome]


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["My_loss", "2nd", "my loss", "naïve", "my__loss", "loss_", "../loss", ""])
def test_a_name_that_is_none_is_refused(command: Command, tmp_path: Path, name: str) -> None:
    done = command("new", "loss", name, "--dir", tmp_path)
    assert done.code == 2
    done.says(repr(name), "lower case, digits and single underscores")
    assert list(tmp_path.iterdir()) == []


def test_the_prefix_is_refused(command: Command, tmp_path: Path) -> None:
    done = command("new", "loss", "saekit-mine", "--dir", tmp_path)
    assert done.code == 2
    done.says("without saekit-")


@pytest.mark.parametrize(
    ("kind", "name", "whose"),
    [
        ("loss", "mse", "loss 'mse' of plugin 'builtin' (saekit "),
        ("metric", "topk", "architecture 'topk' of plugin 'builtin' (saekit "),
        ("callback", "resample", "(saekit-revival "),
        ("loss", "revival", "plugin 'revival' comes with saekit-revival "),
    ],
)
def test_a_name_that_is_taken_is_refused(command: Command, tmp_path: Path, kind: str, name: str, whose: str) -> None:
    done = command("new", kind, name, "--dir", tmp_path)
    assert done.code == 2
    done.says(repr(name), "is taken", whose)
    assert list(tmp_path.iterdir()) == []


def test_what_stands_there_is_left_alone(command: Command, tmp_path: Path) -> None:
    there = tmp_path / "saekit-mine"
    there.mkdir()
    (there / "precious").write_text("text", encoding="utf-8")
    done = command("new", "loss", "mine", "--dir", tmp_path)
    assert done.code == 2
    done.says(str(there), "exists already", "--dir")
    assert [path.name for path in there.iterdir()] == ["precious"]
    assert [path.name for path in tmp_path.iterdir()] == ["saekit-mine"]


def test_a_failure_half_way_leaves_nothing(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    write_text = Path.write_text

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(self)
        return write_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    done = command("new", "loss", "mine", "--dir", tmp_path)
    assert done.code == 2
    done.says("cannot be written", "No space left")
    assert len(written) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_a_file(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = command("new", "loss", "mine", "--dir", file)
    assert done.code == 2
    done.says("cannot be written", "--dir")


# --- what it writes ------------------------------------------------------------------------------------------------


def test_dashes_are_turned_and_the_ending_names_three_commands(command: Command, tmp_path: Path) -> None:
    done = command("new", "graph-builder", "my-graph", "--dir", tmp_path)
    assert done.code == 0
    package = tmp_path / "saekit-my-graph"
    _, *lines = [line.strip() for line in done.out.splitlines() if line.strip()]
    assert lines == [f"pip install -e {package}", "saekit check my_graph", f"saekit run {package / 'run.toml'}"]
    assert (package / "src" / "saekit_my_graph" / "graph_builder.py").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [package.name]
    assert package.stat().st_mode & 0o055 == 0o055  # as any new folder, though a temporary one is its maker's alone


def test_it_imports_no_torch(tmp_path: Path) -> None:
    done = python(
        """
        import sys
        from saekit.cli import main
        sys.argv = ["saekit", "new", "loss", "mine", "--dir", sys.argv[1]]
        main()
        print("torch" in sys.modules)
        """,
        str(tmp_path),
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_every_kind_of_code_has_a_template() -> None:
    assert set(KINDS_WITH_TEMPLATES) == set(KINDS) - {"recipe"}
    for kind in KINDS_WITH_TEMPLATES:
        for path, text in package_files(kind, "mine").items():
            assert "$" not in text, path
            assert text.endswith("\n") and not text.endswith("\n\n"), path


def imported_names(text: str) -> dict[str, set[str]]:
    """The modules that a file imports, with the names that it takes from each."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name, set())
        elif isinstance(node, ast.ImportFrom):
            found.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
    return found


WRITTEN = {f"{kind}: {path}": text for kind in NAMES for path, text in package_files(kind, "mine").items() if path.endswith(".py")}
WRITTEN |= {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in OUTSIDE.rglob("*.py")}


@pytest.mark.parametrize("name", WRITTEN)
def test_it_uses_public_names_alone(name: str) -> None:
    """Of what `saekit new` writes, and of the example of an outside plugin."""
    import saekit.testing

    modules = imported_names(WRITTEN[name])
    public = {"saekit": saekit.__all__, "saekit.testing": saekit.testing.__all__}
    for module, names in modules.items():
        if module.partition(".")[0] == "saekit":
            assert module in public, module
            assert names <= set(public[module])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of all kinds, as the templates of the tree make them."""
    from saekit.cli.new import write_package

    place = tmp_path_factory.mktemp("written")
    for kind, name in NAMES.items():
        write_package(kind, name, place)
    return place


def test_it_is_lint_free(place: Path) -> None:
    """By the rules of this repository; to a stranger's ruff, saekit is a package like any other."""
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), "."]
    done = subprocess.run(ruff, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- what it is worth ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(environment: Callable[[str], Environment], wheels: dict[str, Path]) -> Environment:
    """An environment with the core's wheel and the packages of all kinds, written by its `saekit new`."""
    made = environment("new")
    made.install(wheels["saekit"])
    done = made.each(*(["new", kind.replace("_", "-"), name] for kind, name in NAMES.items()))
    assert [new.code for new in done] == [0] * len(NAMES), done
    made.install(*made.place.glob("saekit-*"))
    return made


@pytest.mark.slow
def test_it_shows_up_among_the_plugins(installed: Environment) -> None:
    plugins = json.loads(installed.saekit("plugins", "--json").stdout)["plugins"]
    assert [plugin for plugin in plugins if plugin["error"]] == []
    assert {c["name"]: c["kind"] for p in plugins for c in p["components"] if p["distribution"] != "saekit"} == {
        name: kind for kind, name in NAMES.items()
    }


@pytest.mark.slow
def test_its_types_are_right(installed: Environment) -> None:
    """Where the wheel is installed, so that what saekit says of its own types (py.typed) is what a stranger sees."""
    sources = sorted(installed.place.glob("saekit-*/src"))
    done = installed.python("-m", "mypy", "--strict", "--ignore-missing-imports", *sources, code=None)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_it_passes_the_checks_of_its_kind(installed: Environment) -> None:
    said = installed.each(*(["check", name, "--json"] for name in NAMES.values()))
    for kind, done in zip(NAMES, said, strict=True):
        assert done.code == 0, done.err
        (report,) = json.loads(done.out)
        assert report["kind"] == kind
        assert report["ok"]
        passed = [check for check in report["checks"] if check["status"] == "passed"]
        assert len(passed) >= 3


@pytest.mark.slow
def test_its_own_tests_pass(installed: Environment) -> None:
    """One process for all, since each imports torch; the loss's once more as its author calls it."""
    packages = sorted(installed.place.glob("saekit-*"))
    pytest_quietly = ("-m", "pytest", "-p", "no:cacheprovider", "-rN")
    done = installed.python(*pytest_quietly, "--import-mode=importlib", *(package / "tests" for package in packages))
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 3 * len(NAMES)
    done = installed.python(*pytest_quietly, at=folder(installed, "loss"))
    assert " passed" in done.stdout


def folder(installed: Environment, kind: str) -> Path:
    return installed.place / f"saekit-{NAMES[kind].replace('_', '-')}"


@pytest.fixture(scope="module")
def ran(installed: Environment) -> dict[str, Outcome]:
    """What `saekit run run.toml` said in the folder of each kind's package."""
    places = [folder(installed, kind) for kind in NAMES]
    said = installed.each(*[["run", "run.toml", "--json", "--directory", "run"]] * len(NAMES), at=places)
    return dict(zip(NAMES, said, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_its_run_file_runs_and_uses_it(installed: Environment, ran: dict[str, Outcome], kind: str) -> None:
    name, run = NAMES[kind], folder(installed, kind) / "run"
    assert ran[kind].code == 0, ran[kind].err
    summary = json.loads(ran[kind].out)
    assert run.parent.name in [plugin["distribution"] for plugin in summary["plugins"]]
    assert summary["warnings"] == []
    for of_one in [*summary["variants"].values()] or [summary]:
        assert of_one["metrics"]["explained_variance"] > 0.5
    works = {
        "loss": lambda: summary["losses"][name] > 0,
        "architecture": lambda: summary["sae"]["architecture"] == name and summary["metrics"]["l0"] <= 8,
        "metric": lambda: 10 < summary["metrics"][name] <= summary["sae"]["d_sae"],
        "analyzer": lambda: 0 < summary["analysis"][name]["largest_cosine"] <= 1,
        "comparison": lambda: 0 < summary["analysis"][name]["least_shared"] <= 1,
        "callback": lambda: ends_with_the_average(run, name),
        "source": lambda: summary["sae"]["d_in"] == 32,
        "tracker": lambda: len(lines_of(run / f"{name}.csv")) > 5,
        "graph_builder": lambda: saekit.FeatureGraph.load(run / "graph.safetensors").builder.endswith(name),
    }
    assert works[kind]()


def ends_with_the_average(run: Path, name: str) -> bool:
    """Whether the last checkpoint's weights are the average that the callback has kept. (Rows are brought back to norm 1.)"""
    from safetensors.torch import load_file

    tensors = load_file(max((run / "checkpoints").glob("step-*")) / "tensors.safetensors")
    return all(bool((tensors[f"sae.{b}"] == tensors[f"listener.callback.{name}.{b}"]).all()) for b in ("b_enc", "b_dec"))


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == sorted({int(row["step"]) for row in rows})
    assert all(float(row["loss"]) > 0 for row in rows)
    return rows
