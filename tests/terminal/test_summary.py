"""The summary at the end, and its picture."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from saekit.terminal.picture import main, picture
from saekit.terminal.summary import render_summary


def text_of(summary: dict, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    render_summary(summary, console)
    return console.file.getvalue()


def test_says_what_was_trained_what_came_out_and_where_it_lies(document):
    text = text_of(document)
    for part in (
        "topk  256 -> 4,096 latents",
        "organism at blocks.2.hook_out",
        "819.2k tokens in 400 steps",
        "16.4k tokens/s",
    ):
        assert part in text
    for part in ("0.9134", "0.9512", "not defined", "peak memory 1.50 GiB", "done in 1 min 20 s", "evaluate 6.0 s"):
        assert part in text
    for part in (
        "steer",
        "strength 15",
        "hoyer 22.50",
        "dead fraction 0.0024",
        "had nothing to say [in 12 of 488 steps]",
    ):
        assert part in text
    directory = document["directory"]
    for part in (f"{directory}/report.html", f"saekit report {directory}", f"saekit compare {directory}"):
        assert part in text


@pytest.mark.parametrize("width", [60, 100])
def test_an_interval_stands_under_its_value_and_notes_below(document, width):
    estimates = {
        "explained_variance": {"interval": [0.9, 0.925], "n": {"tokens": 100}},
        "dead_fraction": {"interval": [0.001, 0.01], "note": "Few latents."},
    }
    notes = {"steer": ["The gain of 2 does not exceed its controls."]}
    text = text_of({**document, "estimates": estimates, "analysis_notes": notes}, width)
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "0.9134" in line)
    assert "0.9 to 0.925" in lines[at + 1] and lines[at].index("0.9134") == lines[at + 1].index("0.9 to")
    assert "dead fraction 0.0024 (0.001 to 0.01)" in text
    assert "dead fraction: Few latents." in text and "steer: The gain of 2 does not exceed its controls." in text
    assert all(len(line) <= width for line in lines if "│" in line)


@pytest.mark.parametrize("width", [60, 100])
def test_each_variant_has_a_row_with_all_of_its_headline_metrics(document, width):
    one = {key: document[key] for key in ("sae", "metrics", "headline", "losses", "analysis")}
    other = {**one, "sae": {**one["sae"], "d_sae": 96}, "metrics": {**one["metrics"], "l0": 7.5}, "headline": ["l0"]}
    variants = {"narrow": one, "wide-one": other}
    text = text_of({**document, "metrics": {}, "headline": [], "losses": {}, "analysis": {}, "variants": variants}, width)
    assert "2 variants" in text and "variants" in text.splitlines()[-4]
    assert all(len(line) <= width for line in text.splitlines() if "│" in line)
    rows = [" ".join(line.split()[1:-1]) for line in text.splitlines() if "wide-one" in line]
    assert rows[0].startswith("wide-one topk 96") and "7.5" in " ".join(rows)
    cells = " ".join(line for line in text.splitlines() if "narrow" in line)
    for value in ("4,096", "0.9134", "32", "0.9512", "not defined"):
        assert value in cells


@pytest.mark.parametrize("width", [40, 80, 200])
def test_keeps_its_width_and_every_headline_metric(document, width):
    text = text_of(document, width)
    panel = [line for line in text.splitlines() if line[:1] in "╭│╰"]
    assert {len(line) for line in panel if line} == {min(width, 108)}
    for value in ("0.9134", "0.9512", "32", "not defined"):
        assert value in text


def test_an_empty_document_is_no_error():
    assert "run" in text_of({})
    nothing = dict.fromkeys(("sae", "metrics", "headline", "analysis", "losses", "seconds", "warnings", "tokens"))
    assert "run" in text_of(nothing)


def test_a_long_path_is_not_broken(document):
    directory = "/a/very/long/path" * 12
    assert f"{directory}/report.html\n" in text_of({**document, "directory": directory}, 60)


def test_no_item_is_broken(document):
    for width in range(40, 110):
        assert "evaluate 6.0 s" in text_of(document, width)


def test_a_path_with_spaces_can_be_pasted(document):
    assert "saekit report 'my runs/a'" in text_of({**document, "directory": "my runs/a"})


def test_markup_and_escapes_in_names_stay_text(document):
    bad = "[bold]\x1b[31m[/x]"
    text = text_of(
        {**document, "run": bad, "warnings": [bad], "analysis": {bad: {bad: bad}}, "model": bad, "losses": {bad: 1.0}}
    )
    assert text.count("[bold]") >= 5 and "\x1b" not in text


def test_the_picture_is_valid_svg_that_fetches_nothing(document, tmp_path):
    history = [
        {"step": s, "seconds": s / 10, "loss": 1 / (s + 1), "loss/mse": 1 / (s + 1), "weight/mse": 1.0}
        for s in range(400)
    ]
    svg = picture(document, history)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    words = "".join(root.itertext()).replace("\xa0", " ")
    for part in ("step 400 of 400", "mse", "0.9134", "saekit compare"):
        assert part in words
    assert "@font-face" not in svg
    assert not re.search(r"url\((?!#)|href=", svg)
    (tmp_path / "summary.json").write_text(json.dumps(document))
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, history)))
    assert main([str(tmp_path), str(tmp_path / "out.svg")]) == 0
    assert (tmp_path / "out.svg").read_text(encoding="utf-8") == svg


def test_the_picture_of_an_unfinished_run_is_refused(tmp_path, capsys):
    (tmp_path / "run.toml").write_text("")
    assert main([str(tmp_path), str(tmp_path / "out.svg")]) == 2
    assert "has no readable summary.json" in capsys.readouterr().err
