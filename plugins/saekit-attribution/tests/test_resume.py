"""An analysis that is killed and run again: nothing is lost or repeated, and the result is that of an undisturbed one."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_attribution.atp import analyzer
from saekit_attribution.atp.analyzer import AttributionPatching
from saekit_attribution.atp.progress import BEGUN, CHUNKS, Progress

from saekit import Result, RunContext
from saekit.plugins import Registry
from saekit.testing.tiny import finished_run, forkserver

OPTIONS: dict[str, Any] = {"methods": ["atp", "ig", "exact"], "save_interval": 2}
SAMPLES = 9

# Runs the analyzer in a directory and kills itself, as hard as can be, at one moment of it.
KILLED = """
import dataclasses, os, signal
from pathlib import Path
import torch
from saekit.run_file import parse_config, read_toml
from saekit.plugins import Registry
from saekit.runner.plan import plan_run
from saekit.testing.tiny import TinyRun
from saekit_attribution.atp import analyzer, progress
import saekit.files

torch.set_num_threads(1)
registry = Registry()
plan = plan_run(parse_config(read_toml(Path(run) / "run.toml"), "run.toml"), registry)
context = TinyRun(Path(run), {}, plan, registry).context
context = dataclasses.replace(context, directory=Path(directory))
owner, name = {
    "attribute": (analyzer, "attribute"),
    "rename": (saekit.files.os, "replace"),
    "results": (analyzer.LabelledData, "write"),
    "finish": (progress.Progress, "finish"),
}[moment]
real, calls = getattr(owner, name), 0

def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(owner, name, counted)
analyzer.AttributionPatching(**options)(context)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    results = []
    for n in range(SAMPLES):
        word = "lamp" * (n % 3 + 1)
        keys = ("template_type", "prompt", "response", "sycophancy_flag")
        variations = [("base", f"{word}?", f"It is {n}.", 0), ("like", f"+{n} {word}?", f"Good {n}.", 1)]
        results.append({"variations": [dict(zip(keys, v, strict=True)) for v in variations]})
    path = tmp_path_factory.mktemp("data") / "labelled.json"
    path.write_text(json.dumps({"results": results}), encoding="utf-8")
    return str(path)


@pytest.fixture
def run() -> Any:
    return finished_run(("subject_model", "tokens"), Registry())


@pytest.fixture
def context(run: Any, tmp_path: Path) -> RunContext:
    return within(run.context, tmp_path / "analysis")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Sums in one order, here and in the other process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def attributed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The places of the samples that are computed from now on."""
    places: list[tuple[int, int]] = []
    real = analyzer.attribute

    def recorded(subject: Any, sae: Any, samples: Any, **options: Any) -> Any:
        places.extend(sample.place for sample in samples)
        return real(subject, sae, samples, **options)

    monkeypatch.setattr(analyzer, "attribute", recorded)
    return places


def within(context: RunContext, directory: Path) -> RunContext:
    directory.mkdir(exist_ok=True)
    return dataclasses.replace(context, directory=directory, warn=lambda message: None)


def killed(run: Any, context: RunContext, options: dict[str, Any], moment: str, number: int) -> None:
    told = {"run": run.directory, "directory": context.directory, "options": options, "moment": moment, "number": number}
    process = forkserver().Process(target=exec, args=(KILLED, told))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


def content(context: RunContext, result: Result) -> tuple[str, bytes]:
    """The result without the name of its file, which has the time in it, and the file."""
    (name,) = result.files
    return json.dumps({**result.to_json(), "files": []}), (context.directory / name).read_bytes()


@pytest.mark.parametrize(
    ("moment", "number", "done"),
    [
        ("attribute", 1, 0),
        ("attribute", 4, 6),
        ("rename", 3, 2),  # the identity, the first chunk, and in the middle of writing the second
        ("results", 1, 9),
        ("finish", 1, 9),
    ],
)
def test_killed_and_resumed_the_result_equals_the_undisturbed_one(
    run: Any,
    context: RunContext,
    data: str,
    attributed: list[tuple[int, int]],
    moment: str,
    number: int,
    done: int,
) -> None:
    options = {"data": data, **OPTIONS}
    undisturbed = within(context, context.directory.with_name("undisturbed"))
    expected = content(undisturbed, AttributionPatching(**options)(undisturbed))
    assert len(attributed) == SAMPLES
    attributed.clear()

    killed(run, context, options, moment, number)
    name = json.loads((context.directory / BEGUN).read_text())["results"]
    result = AttributionPatching(**options)(context)
    assert content(context, result) == expected
    assert result.files == [name]
    assert len(attributed) == len(set(attributed)) == SAMPLES - done
    assert not (context.directory / CHUNKS).exists()
    assert not [path for path in context.directory.glob("*.json") if path.name not in (name, BEGUN)]


def interrupted(context: RunContext, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Run the analysis until `after` chunks are computed."""
    real, calls = analyzer.attribute, 0

    def stops(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(analyzer, "attribute", stops)
        with pytest.raises(KeyboardInterrupt):
            AttributionPatching(**options)(context)


@pytest.mark.parametrize(
    "change",
    ["top_k", "steps", "save_interval", "data", "sae", "hook_point"],
)
def test_what_would_change_the_numbers_begins_anew(
    context: RunContext,
    data: str,
    attributed: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: str,
) -> None:
    options = {"data": data, **OPTIONS}
    interrupted(context, options, monkeypatch, after=3)
    attributed.clear()
    if change == "data":
        document = json.loads(Path(data).read_text())
        document["results"][0]["variations"][1]["prompt"] += "!"
        (tmp_path / "other.json").write_text(json.dumps(document))
        options["data"] = str(tmp_path / "other.json")
    elif change == "sae":
        context = dataclasses.replace(context, sae=copy.deepcopy(context.sae))
        with torch.no_grad():
            context.sae.b_dec[0] += 1e-3
    elif change == "hook_point":
        site = context.source.subject.site
        monkeypatch.setattr(context.source.subject, "site", dataclasses.replace(site, name="elsewhere"))
    else:
        options[change] = 3
    AttributionPatching(**options)(context)
    assert len(attributed) == SAMPLES


def test_the_same_data_elsewhere_goes_on(
    context: RunContext, data: str, attributed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The content of the file counts, not its path or layout."""
    interrupted(context, {"data": data, **OPTIONS}, monkeypatch, after=3)
    (tmp_path / "copy.json").write_text(json.dumps(json.loads(Path(data).read_text()), indent=4))
    attributed.clear()
    AttributionPatching(data=str(tmp_path / "copy.json"), **OPTIONS)(context)
    assert len(attributed) == SAMPLES - 6


def test_a_chunk_that_cannot_be_read_is_done_again(
    context: RunContext, data: str, attributed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"data": data, **OPTIONS}
    interrupted(context, options, monkeypatch, after=3)
    (context.directory / CHUNKS / "000001.json").write_text('{"of": ')
    attributed.clear()
    AttributionPatching(**options)(context)
    assert len(attributed) == SAMPLES - 4


def test_done_again_it_computes_again_under_the_same_name(
    context: RunContext, data: str, attributed: list[tuple[int, int]]
) -> None:
    options = {"data": data, **OPTIONS}
    first, second = (AttributionPatching(**options)(context) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert len(attributed) == 2 * SAMPLES


def test_names_of_results_are_of_the_model_and_never_taken_twice(tmp_path: Path) -> None:
    first = Progress(tmp_path, {"of": 1}, "google/gemma 2 (9b)").results
    assert first.name.startswith("atp_results_google-gemma-2-9b_20")
    first.write_text("{}")
    assert Progress(tmp_path, {"of": 1}, "x").results == first  # the same analysis
    assert Progress(tmp_path, {"of": 2}, "google/gemma 2 (9b)").results != first
