"""`saekit compare`: what runs came to, where they differ, and a word where they cannot be compared."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from saekit.errors import UsageError
from saekit.report.compare import cells, compare, comparison_page

HERE = Path(__file__).parent


def _neighbour(name: str) -> Any:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REPORT = _neighbour("test_report")
ATTACK, Page, edit = REPORT.ATTACK, REPORT.Page, REPORT.edit

CONFIG: dict[str, Any] = {
    "recipe": "quickstart",
    "directory": "runs",
    "source": {"use": "organism", "hook_point": "blocks.2.hook_out"},
    "architecture": {"use": "topk", "d_sae": 4096, "k": 32},
    "loss": [{"use": "mse"}, {"use": "auxk", "weight": 0.03125}],
    "metric": [{"use": "l0"}, {"use": "dead"}],
    "training": {"tokens": 999_424, "batch_size": 2048, "seed": 0, "normalize": True},
}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two finished runs; the second has k = 16, no auxk, another seed, and its own numbers."""
    conftest = _neighbour("conftest")
    first, second = (conftest.make_run(tmp_path / name) for name in ("first", "second"))
    edit(first / "summary.json", run="first")
    edit(second / "summary.json", run="second", metrics={**json.loads((second / "summary.json").read_text())["metrics"],
         "explained_variance": 0.75, "fvu": None, "only_here": 3})  # fmt: skip
    write(first)
    write(second, architecture={"use": "topk", "d_sae": 4096, "k": 16}, loss=[{"use": "mse"}], directory="elsewhere",
          metric=[{"use": "dead"}, {"use": "l0"}], training={**CONFIG["training"], "seed": 1, "normalize": False})  # fmt: skip
    return first, second


def curves(page: Any) -> list[Any]:
    """The figures of a page but for the bars."""
    return [spec for name, spec in page.data.items() if not name.startswith("bars")]


def write(run: Path, **changes: Any) -> None:
    (run / "run.toml").write_text(tomli_w.dumps(CONFIG | changes))


def say(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "saekit", "compare", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    return done


def test_the_headline_is_compared_by_default(runs) -> None:
    comparison = compare(runs)
    assert comparison.columns == ["explained_variance", "l0", "dead_fraction", "ce_recovered", "probe_score"]
    first, second = (cells(side, comparison.columns) for side in comparison.sides)
    assert [cell.text for cell in first] == ["0.9134", "32", "0.0024", "0.9512", "not defined"]
    assert [cell.sort for cell in second] == [0.75, 32.0, 0.0024, 0.9512, None]
    assert comparison.warnings == []


def test_values_by_their_names(runs) -> None:
    names = ["only_here", "fvu", "losses.mse", "analysis.features.median_density", "analysis.steer.shift", "tokens"]
    first, second = ([cell.text for cell in cells(side, names)] for side in compare(runs, names).sides)
    assert first == ["-", "0.0866", "0.0935", "0.0004", "not defined", "999,424"]
    assert second[:2] == ["3", "not defined"]
    with pytest.raises(UsageError, match=r"--metric analysis.feature.dead: none of these runs has it. Did you mean"):
        compare(runs, ["analysis.feature.dead"])


def test_everything(runs) -> None:
    comparison = compare(runs, ["tokens"], everything=True)
    assert comparison.columns[0] == "tokens"
    assert len(set(comparison.columns)) == len(comparison.columns)
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert {*summary["metrics"], "losses.hoyer", "analysis.steer.strength", "seconds.harvest", "only_here"} <= {*comparison.columns}


def test_differences_of_the_configurations(runs) -> None:
    """By the key that -o takes; neither the order of metrics nor where runs are made is one."""
    comparison = compare(runs)
    assert comparison.differences == ["architecture.k", "loss", "loss.auxk.weight", "training.seed", "training.normalize"]
    differences = [run["differences"] for run in comparison.to_json()["runs"]]
    training = {"training.seed": 0, "training.normalize": True}
    assert differences[0] == {"architecture.k": 32, "loss": ["auxk", "mse"], "loss.auxk.weight": 0.03125, **training}
    assert differences[1] == {"architecture.k": 16, "loss": ["mse"], "training.seed": 1, "training.normalize": False}
    assert compare([runs[0], runs[0]]).differences == []
    assert len(compare([runs[0], runs[0]]).sides) == 1
    write(runs[0], callback=[{"use": "a"}, {"use": "b"}])
    write(runs[1], callback=[{"use": "b"}, {"use": "a"}])
    assert compare(runs).differences == ["callback"]  # the order in which they are called


def test_an_unfinished_run_is_said_to_be_so(runs) -> None:
    (runs[1] / "summary.json").unlink()
    lines = (runs[1] / "metrics.jsonl").read_text().splitlines()
    (runs[1] / "metrics.jsonl").write_text("\n".join(lines[:50]) + "\n")
    comparison = compare(runs, ["explained_variance", "analysis.features.latents_shown"])
    assert comparison.sides[1].state == "200 of 488 steps"
    assert [cell.text for cell in cells(comparison.sides[1], comparison.columns)] == ["-", "2"]
    document = comparison.to_json()["runs"][1]
    assert (document["finished"], document["values"]) == (False, {"analysis.features.latents_shown": 2})
    said = say(*runs)
    assert said.returncode == 0 and "! second is unfinished: 200 of 488 steps." in said.stdout
    assert "second is unfinished: 200 of 488 steps." in Page(comparison_page(comparison)).text
    (runs[1] / "metrics.jsonl").unlink()
    assert compare(runs).sides[1].state == "nothing was logged"


@pytest.mark.parametrize(
    ("summary", "source", "words"),
    [
        ({"hook_point": "blocks.1.hook_out"}, {}, r"different hook points \(first: blocks.2.hook_out, second: blocks.1.hook_out\)"),
        ({"model": "gpt2"}, {}, r"different models \(first: organism, second: gpt2\)"),
        ({}, {"sha256": "0"}, "made differently: they differ in sha256"),
    ],
)
def test_what_cannot_be_compared_gets_a_warning(runs, summary, source, words: str) -> None:
    edit(runs[1] / "summary.json", **summary)
    provenance = json.loads((runs[1] / "provenance.json").read_text())
    edit(runs[1] / "provenance.json", source=provenance["source"] | source)
    (warning,) = compare(runs).warnings
    assert re.search(words, warning)
    assert warning in Page(comparison_page(compare(runs))).text
    assert warning.partition("(")[0] in say(*runs).stdout


def test_the_table_in_the_terminal(runs) -> None:
    said = say(*runs)
    assert said.returncode == 0 and said.stderr == ""
    lines = [line.split() for line in said.stdout.splitlines()]
    assert ["run", "explained_variance", "l0", "dead_fraction", "ce_recovered", "probe_score"] in lines
    assert ["first", "0.9134", "32", "0.0024", "0.9512", "not", "defined"] in lines
    assert ["second", "16", "mse", "-", "1", "false"] in lines
    wide = say(*runs, "--all")
    assert all(len(line) <= 160 for line in wide.stdout.splitlines())
    assert wide.stdout.count("first") > 2  # in every part of a table that has no room in one


def test_json(runs) -> None:
    document = json.loads(say(*runs, "--json", "--metric", "fvu").stdout)
    assert document["columns"] == ["fvu"]
    assert [run["values"] for run in document["runs"]] == [{"fvu": 0.0866}, {"fvu": None}]
    assert [run["directory"] for run in document["runs"]] == [str(run) for run in runs]


def test_runs_of_one_name_go_by_their_directories(runs) -> None:
    edit(runs[1] / "summary.json", run="first")
    assert [side.name for side in compare(runs).sides] == [str(run) for run in runs]


def test_curves_lie_over_one_another(runs) -> None:
    page = Page(comparison_page(compare(runs), ["loss/mse", "explained_variance"]))
    specs = curves(page)
    assert len(specs) == 2
    history = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()[:-1]]
    for spec, name in zip(specs, ("loss/mse", "explained_variance"), strict=True):
        assert [trace["name"] for trace in spec["data"]] == ["first", "second"]
        assert spec["data"][0]["y"] == [row[name] for row in history]
        assert spec["data"][0]["x"] == [row["tokens"] for row in history]
        assert spec["layout"]["xaxis"]["title"]["text"] == "activations trained on"
    assert specs[0]["layout"]["yaxis"] == {"type": "log"} and specs[1]["layout"]["yaxis"] == {}
    with pytest.raises(UsageError, match=r"--curve loss/msee: none of these runs logged it. Did you mean 'loss/mse'"):
        comparison_page(compare(runs), ["loss/msee"])


def test_a_run_keeps_its_colour_where_another_has_no_such_curve(runs) -> None:
    rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()[:-1]]
    kept = [{k: v for k, v in row.items() if k != "loss/auxk"} for row in rows]
    (runs[0] / "metrics.jsonl").write_text("\n".join(map(json.dumps, kept)))
    (spec,) = curves(Page(comparison_page(compare(runs), ["loss/auxk"])))
    assert [trace["name"] for trace in spec["data"]] == ["first", "second"]
    assert [bool(trace["x"]) for trace in spec["data"]] == [False, True]
    assert [trace["showlegend"] for trace in spec["data"]] == [False, True]


def test_steps_where_the_activations_were_not_logged(runs) -> None:
    rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()[:-1]]
    (runs[0] / "metrics.jsonl").write_text("\n".join(json.dumps({k: v for k, v in r.items() if k != "tokens"}) for r in rows))
    (spec,) = curves(Page(comparison_page(compare(runs), ["loss"])))
    assert spec["data"][1]["x"] == [row["step"] for row in rows]
    assert spec["layout"]["xaxis"]["title"]["text"] == "step"


def test_all_curves_by_default(runs) -> None:
    page = Page(comparison_page(compare(runs)))
    for name in ("loss", "loss/hoyer", "grad_norm", "gate_temperature"):
        assert name in page.text
    assert len(curves(page)) == 11  # all that was logged but step, tokens, seconds and weights


def test_the_page_is_whole_and_fetches_nothing(runs, tmp_path: Path) -> None:
    said = say(*runs, "--html", tmp_path / "page.html")
    assert said.returncode == 0 and said.stdout.splitlines()[-1] == str(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.code) == 2
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "img"}
        assert not {"src", "srcset", "action"} & attributes.keys()
    assert "first" in page.text and "0.9134" in page.text and "architecture.k" in page.text
    holders = [attributes["data-spec"] for attributes in page.of("div") if "data-spec" in attributes]
    assert sorted(holders) == sorted(page.data)


def test_hostile_text_stays_text(runs, tmp_path: Path) -> None:
    REPORT.hostile(runs[0])
    page = Page(comparison_page(compare(runs, everything=True)))
    assert len(page.code) == 2 and not page.of("img")
    assert ATTACK in page.text
    edit(runs[0] / "summary.json", run="bell \x07 and \x1b[31m red")
    assert "\x1b" not in say(*runs).stdout and "\x07" not in say(*runs).stdout


def test_bad_calls(runs, tmp_path: Path) -> None:
    for arguments, words in [
        ([tmp_path], "is not a run directory"),
        ([tmp_path / "absent"], "there is no such directory"),
        ([*runs, "--curve", "loss"], "--curve: belongs to --html"),
        ([*runs, "--metric", "explained_varianse"], "Did you mean 'explained_variance'"),
        ([], "Missing argument"),
    ]:
        done = say(*arguments)
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_damaged_files_are_no_crash(runs) -> None:
    (runs[0] / "summary.json").write_text('{"metrics": 3, "headline": {}, "analysis": [1], "losses": null, "run": 7}')
    (runs[0] / "run.toml").write_text("= nothing")
    (runs[1] / "provenance.json").write_text("[]")
    comparison = compare(runs)
    assert comparison.sides[0].name == "7"
    assert say(*runs).returncode == 0
    comparison_page(comparison)


def test_an_analysis_says_which_of_its_scalars_are_shown(runs) -> None:
    first, second = runs
    result = json.loads(next(first.glob("analysis/*/result.json")).read_text())
    name = next(first.glob("analysis/*/result.json")).parent.name
    result["scalars"], result["headline"] = {"effect": 2.5, "aside": 1}, ["effect", "gone"]
    (first / "analysis" / name / "result.json").write_text(json.dumps(result))
    edit(first / "summary.json", analysis={name: {"effect": 2.5, "aside": 1}})
    found = compare([first, second])
    assert f"analysis.{name}.effect" in found.columns
    assert not {f"analysis.{name}.aside", f"analysis.{name}.gone"} & set(found.columns)


def test_a_bar_for_each_run_where_two_or_more_have_a_number(runs) -> None:
    page = comparison_page(compare(runs, ["explained_variance", "only_here"]))
    assert '"type": "bar"' in page or '"type":"bar"' in page
    assert page.count('id="bars-figure-') == 1, "only one of the two has only_here"
