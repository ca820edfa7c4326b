"""Every example of README.md and docs/ runs: on a tiny model, on few tokens.

A block is skipped only where a comment `<!-- not run: REASON -->` stands right before it. A TOML block that lacks a
source or an architecture is a fragment of a run file and is completed; one with a title is written to that file.
"""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
import shlex
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import tomli_w

import saekit
from saekit.cli import cli
from saekit.kinds import HOOKS
from saekit.plugins import Registry
from saekit.run_file import parse_config
from saekit.runner.plan import plan_run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [*sorted(ROOT.glob("plugins/*/README.md")), *sorted(ROOT.glob("docs/examples/*/README.md"))]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
SMALL = {
    "training": {"tokens": 1200, "batch_size": 100, "buffer": 400, "device": "cpu", "seed": 0},
    "evaluation": {"tokens": 200},
}
KNOWN_LANGUAGES = {"", "text", "python", "toml", "sh"}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page. title: what `title="..."` says, a file's name."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["info"])
        line = text[: match.start("language")].count("\n") + 1
        found.append(Block(page, line, match["language"], title[1] if title else "", match["text"], match["reason"]))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [block for block in BLOCKS if block.reason is None]


def of_language(language: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in RUN if block.language == language]


@pytest.fixture(scope="module")
def source(tiny_gpt2: Path, text_file: Path) -> dict[str, Any]:
    return {"use": "text", "model": str(tiny_gpt2), "hook_point": "blocks.1.hook_out", "data": str(text_file), "context": 32}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, source: dict[str, Any]) -> Path:
    """The directory of a finished run of the README's run file, reduced."""
    place = tmp_path_factory.mktemp("finished")
    path = place / "run.toml"
    path.write_text(tomli_w.dumps(reduced(readme_run_file(), source)), encoding="utf-8")
    return saekit.run(path, directory=place / "run").directory


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: dict[str, Any], finished: Path, tiny_gpt2: Path, text_file: Path
) -> Path:
    """A directory with all that the examples name: a model, texts, a run file, a finished run, the plugins' files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_gpt2, tmp_path / "my-model")
    config = json.loads((tmp_path / "my-model" / "config.json").read_text(encoding="utf-8"))
    config["n_positions"] = 1024  # only planned with, never loaded
    (tmp_path / "my-model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "texts").mkdir()
    shutil.copy(text_file, tmp_path / "texts" / "some.txt")
    (tmp_path / "names.jsonl").write_text('{"text": "Ada met Zoë.", "name": [[0, 3], [8, 11]]}', encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in text_file.read_text(encoding="utf-8").split("\n\n")]
    (tmp_path / "texts" / "some.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name in ("run.toml", "variants.toml"):
        (tmp_path / name).write_text(tomli_w.dumps(reduced(run_file_shown(name), source)), encoding="utf-8")
    for name in set(re.findall(r"runs/([\w-]+)/sae", "".join(block.text for block in RUN))):
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / name).symlink_to(finished)
    return tmp_path


def run_file_shown(name: str) -> dict[str, Any]:
    return next(tomllib.loads(block.text) for block in RUN if block.title == name)


def readme_run_file() -> dict[str, Any]:
    return run_file_shown("run.toml")


def reduced(table: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """A run file that does the same on the tiny model and few tokens."""
    small = {**table, "source": source}
    small["architecture"] = {**table["architecture"], "d_sae": 64, "k": 4}
    small["training"] = {**table.get("training", {}), **SMALL["training"]}
    small["evaluation"] = {**table.get("evaluation", {}), **SMALL["evaluation"]}
    return small


def test_every_block_has_a_known_language() -> None:
    """A misspelt language would leave its example out of these tests."""
    assert {str(b): b.language for b in BLOCKS if b.language not in KNOWN_LANGUAGES} == {}
    assert all(block.reason.strip() for block in BLOCKS if block.reason is not None)


def test_pages_have_examples() -> None:
    """The blocks are really found."""
    assert {"python", "toml", "sh"} <= {block.language for block in RUN if block.page.name == "README.md"}


@pytest.mark.parametrize("block", of_language("toml"))
def test_toml(block: Block, workplace: Path, finished: Path) -> None:
    """A run file can be planned; a pyproject.toml declares a plugin; nothing of it is misspelt."""
    table = tomllib.loads(block.text)
    if block.title == "pyproject.toml":
        assert table["project"]["entry-points"]["saekit"]
        return
    table.setdefault("source", {"use": "text", "model": "my-model", "hook_point": "blocks.1.hook_out", "data": "texts"})
    table.setdefault("architecture", {"use": "topk", "d_sae": 64, "k": 4})
    table.setdefault("loss", [{"use": "mse"}])
    plan = plan_run(parse_config(table, str(block)), Registry())
    assert plan.warnings == []


@pytest.mark.parametrize("block", of_language("python"))
def test_python(block: Block, workplace: Path, source: dict[str, Any]) -> None:
    """A file declares components whose options can be read; other code runs, or says what its prompt says."""
    if block.title:
        components = declared(block, workplace)
        for component in components:
            component.options_model()
            assert component.summary, f"{component.name} has no docstring"
        return
    if block.page.name == "organism.md":
        cards = (ROOT / "saekit" / "organism" / "weights").glob("*/card.json")
        if not list(cards):
            pytest.skip("the organism's weights are not there")
    if ">>>" in block.text:
        test = doctest.DocTestParser().get_doctest(block.text, {}, str(block), str(block.page), block.line)
        report: list[str] = []
        failures = doctest.DocTestRunner(verbose=False).run(test, out=report.append).failed
        assert failures == 0, "".join(report)
        return
    exec(compile(block.text, str(block), "exec"), {"__name__": "example"})


def declared(block: Block, place: Path) -> list[Any]:
    """The components of a file that a page shows; it must load as a plugin."""
    path = place / Path(block.title).name
    path.write_text(block.text, encoding="utf-8")
    (plugin,) = [p for p in Registry(files=[path]).plugins if p.file == path.resolve()]
    assert plugin.error is None
    return plugin.components


FILES = [block for block in RUN if block.language == "python" and block.title and "saekit_" in block.text]


@pytest.mark.parametrize("block", [pytest.param(block, id=str(block)) for block in FILES])
def test_each_component_that_a_page_shows_works_in_a_run(block: Block, workplace: Path, source: dict[str, Any]) -> None:
    components = declared(block, workplace)
    table = reduced(readme_run_file(), source)
    for component in components:
        if component.kind == "architecture":
            table["architecture"] = {"use": component.name, "d_sae": 64}
        elif component.kind == "graph_builder":
            table["graph"] = {"use": component.name}
        else:
            table.setdefault(component.kind, []).append({"use": component.name})
    path = workplace / "with_plugin.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    run = saekit.run(path, plugins=[workplace / Path(block.title).name], directory=workplace / "out")
    assert run.summary["tokens"] == SMALL["training"]["tokens"]
    assert {p["name"] for p in run.summary["plugins"]} >= {component.plugin for component in components}
    assert not [w for w in run.summary["warnings"] if "gradient" in w], "the example's loss must teach something"
    resumed = checkpoint_of(run.directory)
    for component in components:
        if component.kind == "metric":
            assert len(run.summary["metrics"]) > len(saekit_metrics_of(workplace))
        if component.kind == "analyzer":
            assert component.name in run.summary["analysis"]
        if component.kind == "graph_builder":
            assert run.summary["graph"]["builder"] == component.qualified_name and run.summary["graph"]["edges"] > 0
        if component.kind == "loss":
            assert component.name in run.summary["losses"]
        if component.kind == "callback":
            assert any(key.startswith("listener.") and f".{component.name}." in key for key in resumed)


def saekit_metrics_of(workplace: Path) -> list[str]:
    """The held-out metrics of the finished run that the workplace links to."""
    (finished,) = {path.resolve() for path in (workplace / "runs").iterdir()}
    return list(json.loads((finished / "summary.json").read_text(encoding="utf-8"))["metrics"])


def checkpoint_of(run: Path) -> list[str]:
    """The names of what the newest checkpoint holds of listeners and losses."""
    from safetensors import safe_open

    newest = max((run / "checkpoints").glob("step-*"))
    with safe_open(newest / "tensors.safetensors", framework="pt") as file:
        tensors = list(file.keys())
    return [*tensors, *json.loads((newest / "state.json").read_text(encoding="utf-8"))["trainer"]]


def commands(block: Block) -> list[str]:
    joined = block.text.replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("block", of_language("sh"))
def test_commands(block: Block) -> None:
    """Each command is one that exists, with options that it has."""
    for line in commands(block):
        program, *arguments = shlex.split(line.split(" > ")[0])
        if program == "saekit":
            parse(cli, arguments)
        elif program == "make":
            assert arguments[0] in re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        elif program == "python":
            assert arguments[0] == "-m"
            assert importlib.util.find_spec(arguments[1]), line
        else:
            assert program in ("source", "pip"), line


def parse(command: click.Command, arguments: list[str]) -> None:
    """Read a command line without carrying it out; a usage error fails the test."""
    with command.make_context(command.name or "saekit", list(arguments)) as context:
        if isinstance(command, click.Group):
            rest = [*context._protected_args, *context.args]
            if rest:
                _, subcommand, rest = command.resolve_command(context, rest)
                assert subcommand is not None
                parse(subcommand, rest)


def test_the_loss_of_the_readme_runs_with_its_command(workplace: Path, source: dict[str, Any]) -> None:
    """The file and the command as they stand in README.md, with what makes them small added."""
    (loss,) = [block for block in RUN if block.page.name == "README.md" and block.title == "hoyer.py"]
    (line,) = [line for b in RUN if b.page == loss.page and b.language == "sh" for line in commands(b) if "hoyer.py" in line]
    (workplace / loss.title).write_text(loss.text, encoding="utf-8")
    small = [f"--override=training.{key}={value}" for key, value in SMALL["training"].items()]
    small += [f"--override=evaluation.{key}={value}" for key, value in SMALL["evaluation"].items()]
    small += ["--override=architecture.d_sae=64", "--override=architecture.k=4", "--directory=out"]
    options = ",".join(f"{key}={json.dumps(value)}" for key, value in source.items() if key != "use")
    _, *arguments = shlex.split(line)
    cli.main([*arguments, f"--source=text:{options}", *small], standalone_mode=False)
    summary = json.loads(Path("out/summary.json").read_text(encoding="utf-8"))
    assert summary["losses"]["hoyer"] > 0
    logged = [json.loads(text) for text in Path("out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    weight = float(re.search(r"weight=([\d.]+)", line)[1])
    assert all(row["weight/hoyer"] == weight for row in logged)


def test_what_a_run_writes_is_what_the_pages_say(finished: Path) -> None:
    """Keys of summary.json and metrics.jsonl, names of metrics and files: each stands on its page."""
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    files_page = (ROOT / "docs/files.md").read_text(encoding="utf-8")
    metrics_page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert [key for key in summary if f"`{key}`" not in files_page] == []
    assert [key for key in summary["metrics"] if f"`{key}`" not in metrics_page] == []
    assert [key for key in summary["analysis"]["features"] if f"`{key}`" not in metrics_page] == []
    last = json.loads((finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert [key for key in last if "/" not in key and f"`{key}`" not in files_page] == []
    top = {path.name for path in finished.iterdir()}
    assert [name for name in top if f"`{name}" not in files_page and f"`{name}/" not in files_page] == []


def test_every_kind_is_on_the_page_about_plugins() -> None:
    page = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
    assert [f"{kind}, {hook}" for kind, hook in HOOKS.items() if f"| {kind} | `{hook}` |" not in page] == []
