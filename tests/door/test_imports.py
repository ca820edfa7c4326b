"""What may import what, what is never named, and what costs nothing: read from the source, or seen in a fresh process."""

from __future__ import annotations

import ast
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import python, tiny_table

import saekit
from saekit.hookspecs import Declaring, Lifecycle
from saekit.plugins import Registry

ROOT = Path(saekit.__file__).parent
# From the top to the bottom; what stands in one group may import what stands in a lower one, or beside it without a circle.
LEVELS = [
    {"cli", "__main__"},
    {"testing"},
    {"online"},
    {"api"},
    {"runner"},
    {"training", "report", "terminal"},
    {"sae", "activations", "graph", "interventions", "organism"},
    {
        "config", "variants", "schedules", "plugins", "component", "component_option", "kinds", "registered", "run_file",
        "hookspecs", "protocols", "listeners", "result", "errors", "files", "compatibility", "options", "numerics",
        "checked_tensors", "run_directory", "lock", "process_state", "seeds", "wording", "controls", "intervals", "estimate",
        "ranks", "out_of_memory", "plugin_commands", "examples",
    },
]
LEVEL = {name: len(LEVELS) - number for number, names in enumerate(LEVELS) for name in names}
# Words that are a component's name and mean something else as well, where they stand in the core.
ORDINARY = {
    "text": "a column's name in data, a kind of field",
    "builtin": "the directory's name",
    "organism": "the package that holds the model organism",
    "encoder": "a kind of model",
    "explained_variance": "a key of what a step logs",
    "l0": "a key of what a step logs",
    "dead": "a key of what a step logs, a field of Step",
    "density": "a figure's axis",
    "cosine": "a schedule's word",
    "ablate": "the name of a public function",
    "graph": "a section of the run file, a module, a field of Step; also the name of a first-party plugin",
    "sycophancy": "a kind of the organism's documents, and a module",
}


def sources(*outside: str) -> Iterator[tuple[str, Path]]:
    """(first name below saekit, file) of every module of the package, but for those in the directories `outside`."""
    for path in sorted(ROOT.rglob("*.py")):
        first = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if first not in outside:
            yield first, path


def imported(path: Path) -> set[str]:
    """Modules that a file imports when it runs: imports for type checkers alone are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    idle: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            idle |= {inner for statement in node.body for inner in ast.walk(statement)}
    found = set()
    for node in set(ast.walk(tree)) - idle:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            # `from saekit import organism` imports a part; `from saekit import Step` a public name.
            parts = {f"saekit.{alias.name}" for alias in node.names if alias.name in LEVEL or alias.name == "builtin"}
            found |= parts if module == "saekit" and parts else {module}
    return found


def parts_imported() -> dict[str, set[str]]:
    """For each part of the package, the other parts that it imports."""
    graph: dict[str, set[str]] = defaultdict(set)
    for part, path in sources():
        for module in imported(path):
            if module.startswith("saekit."):
                graph[part].add(module.split(".")[1])
    return {part: others - {part} for part, others in graph.items()}


def test_every_part_has_a_place() -> None:
    known = {*LEVEL, "builtin", "__init__"}
    assert {part for part, _ in sources()} <= known


def test_imports_point_down_only() -> None:
    for part, others in parts_imported().items():
        for other in others:
            if part in ("builtin", "__init__"):
                continue
            assert other != "builtin", f"{part} imports builtin"
            assert LEVEL[other] <= LEVEL[part], f"{part} imports {other}, which stands above it"


def test_there_is_no_circle_among_the_parts() -> None:
    graph = {part: others for part, others in parts_imported().items() if part != "__init__"}
    while graph:
        leaves = [part for part, others in graph.items() if not others & graph.keys()]
        assert leaves, f"these import one another in a circle: {graph}"
        for part in leaves:
            del graph[part]


def test_builtin_is_imported_by_nobody() -> None:
    plugins = sorted((ROOT.parent / "plugins").glob("*/src/**/*.py"))
    for path in [*(p for part, p in sources() if part != "builtin"), *plugins]:
        assert not [m for m in imported(path) if m.startswith("saekit.builtin")], path


def test_the_core_names_no_component_and_no_plugin() -> None:
    """No string of the core is the name of a component or of a plugin, the built-in ones included."""
    registry = Registry()
    names = {c.name for c in registry.components()} | {c.qualified_name for c in registry.components()}
    names = (names | {plugin.name for plugin in registry.plugins}) - set(ORDINARY)
    assert {"mse", "topk", "quickstart"} <= names
    found = []
    for _part, path in sources("builtin", "testing"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in names and id(node) not in docstrings:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}")
    assert not found, found


CALLS = ("emit", "call", "_tell")


def test_every_call_of_a_lifecycle_hook_passes_what_its_specification_says() -> None:
    seen = set()
    for _, path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
                first = node.args[0]
                if not isinstance(first, ast.Constant):
                    continue
                specification = getattr(Lifecycle, first.value)
                wanted = set(specification.__code__.co_varnames[1 : specification.__code__.co_argcount])
                wanted -= {"run"} if node.func.attr == "_tell" else set()  # which says it itself
                assert {keyword.arg for keyword in node.keywords} == wanted, f"{path}:{node.lineno}"
                seen.add(first.value)
    assert seen == {name for name in vars(Lifecycle) if not name.startswith("_")}


def test_every_hook_says_when_it_is_called() -> None:
    for family in (Declaring, Lifecycle):
        for name, hook in vars(family).items():
            if not name.startswith("_"):
                assert hook.__doc__, name


HEAVY = ("torch", "transformers", "numpy", "pydantic", "plotly", "rich.live", "torchmetrics", "safetensors", "jinja2")


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import saekit", ()),
        ("import saekit; saekit.Component; saekit.hookimpl; saekit.Registry if False else None", ()),
        ("import sys; sys.argv = ['saekit', '--help']; from saekit.cli import main; main()", ()),
        ("import sys; sys.argv = ['saekit', 'plugins']; from saekit.cli import main; main()", ()),
        ("import sys; sys.argv = ['saekit', 'plugins', '--json']; from saekit.cli import main; main()", ()),
        ("import sys; sys.argv = ['saekit', 'recipes']; from saekit.cli import main; main()", ("pydantic",)),
        ("import sys; sys.argv = ['saekit', 'schema']; from saekit.cli import main; main()", ("pydantic",)),
        ("import sys; sys.argv = ['saekit', 'run', '--help']; from saekit.cli import main; main()", ()),
    ],
)
def test_what_only_lists_imports_nothing_heavy(code: str, allowed: tuple[str, ...]) -> None:
    done = python(
        f"""
        import sys
        try:
            exec({code!r})
        except SystemExit:
            pass
        print("IMPORTED", *(name for name in {HEAVY!r} if name in sys.modules))
        """
    )
    heavy = set(done.stdout.splitlines()[-1].split()[1:]) - set(allowed)
    assert not heavy


NOT_FOR_A_PLAN = (
    "transformers", "transformer_lens", "sae_lens", "datasets", "torchmetrics", "scipy", "sklearn", "networkx",
    "torch_geometric", "plotly", "jinja2",
)  # fmt: skip


@pytest.mark.parametrize("recipe", [component.name for component in Registry().components("recipe")])
def test_a_dry_run_imports_nothing_that_only_a_run_needs(recipe: str) -> None:
    done = python(
        f"""
        import sys
        from saekit.cli import main
        sys.argv = ["saekit", "run", {recipe!r}, "--dry-run"]
        main()
        print("IMPORTED", *(name for name in {NOT_FOR_A_PLAN!r} if name in sys.modules))
        """
    )
    assert done.stdout.splitlines()[-1] == "IMPORTED"


def test_a_dry_run_loads_no_model(tiny_gpt2: Path, text_file: Path, tmp_path: Path) -> None:
    """The weights may even be missing, and nothing of transformers builds a model."""
    model = tmp_path / "model"
    shutil.copytree(tiny_gpt2, model)
    (model / "model.safetensors").unlink()
    file = tmp_path / "tiny.toml"
    import tomli_w

    file.write_text(tomli_w.dumps(tiny_table(model, text_file)), encoding="utf-8")
    done = python(
        """
        import sys
        import transformers
        def loads(*args, **kwargs):
            raise AssertionError("a model was loaded")
        transformers.AutoModelForCausalLM.from_pretrained = transformers.AutoModel.from_pretrained = loads
        transformers.AutoTokenizer.from_pretrained = loads
        from saekit.cli import main
        sys.argv = ["saekit", "run", sys.argv[1], "--dry-run", "--json"]
        main()
        """,
        str(file),
    )
    plan = json.loads(done.stdout)
    assert plan["source"]["d_in"] == 32
    assert plan["steps"] == 20
    assert [part["key"] for part in plan["parts"]][:3] == ["source", "architecture", "loss.mse"]
    assert not (tmp_path / "runs").exists()
