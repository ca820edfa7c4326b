"""The report: whole, self-contained, faithful to what is undefined, and deaf to what hostile text asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from saekit.errors import RunError, UsageError
from saekit.report import write_report
from saekit.report.curves import POINTS, loss_figures, thinned
from saekit.run_directory import read_history, read_run

ATTACK = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{7*7}}"
VOID = {"meta", "link", "img", "br", "hr", "input", "base"}


class Page(HTMLParser):
    """The elements, scripts and visible text of a report."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.code: list[str] = []
        self.data: dict[str, dict] = {}
        self.text = ""
        self._open: list[tuple[str, dict]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data):
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script" and attributes.get("type") == "application/json":
            self.data[attributes["id"]] = json.loads(
                data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
            )
        elif tag == "script":
            self.code.append(data)
        elif tag != "style":
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(directory: Path) -> Page:
    return Page(write_report(directory).read_text(encoding="utf-8"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_shows_what_the_run_left(run_directory):
    page = page_of(run_directory)
    summary = json.loads((run_directory / "summary.json").read_text())
    for text in (
        summary["run"],
        "organism",
        "blocks.2.hook_out",
        "topk",
        "0.9134",
        "d_sae = 4096",
        "saekit-hoyer",
        "9f2c9f2c",
    ):
        assert text in page.text
    assert summary["warnings"][0] in page.text
    for name in ("features", "steer"):
        result = json.loads((run_directory / "analysis" / name / "result.json").read_text())
        for note in result["notes"]:
            assert note in page.text
        for title in (*result["figures"], *result["scalars"]):
            assert title in page.text
    assert "Top activating examples" in page.text
    assert "The argument is sound (-30)." in page.text


def test_every_figure_stands_in_the_page_with_its_data(run_directory):
    page = page_of(run_directory)
    holders = [attributes["data-spec"] for attributes in page.of("div") if "data-spec" in attributes]
    assert sorted(holders) == sorted(page.data) and len(set(holders)) == len(holders)
    analysis = [spec for key, spec in page.data.items() if key.startswith("analysis-")]
    assert len(analysis) == 3
    assert [2, None, 1] in [z for spec in analysis for trace in spec["data"] for z in trace.get("z", [])]
    losses = {trace["name"]: trace for trace in page.data["loss-figure-0"]["data"]}
    assert set(losses) == {"total", "mse × weight", "auxk × weight", "hoyer × weight"}
    parts = [losses[name]["y"] for name in losses if name != "total"]
    assert losses["total"]["y"] == pytest.approx([sum(values) for values in zip(*parts, strict=True)])


def test_measures_of_any_name_get_a_chart(run_directory):
    page = page_of(run_directory)
    captions = [spec["data"][0]["name"] for key, spec in page.data.items() if key.startswith("measure-")]
    assert captions[:3] == ["explained_variance", "l0", "dead"]
    assert "gate_temperature" in captions
    assert not {"tokens", "seconds", "step"} & set(captions)


def test_fetches_nothing(run_directory):
    html = write_report(run_directory).read_text(encoding="utf-8")
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "img"}
        for name in ("src", "srcset", "data", "action", "poster"):
            assert name not in attributes
        assert not re.match(r"(?i)\s*(https?:)?//|\s*javascript:", attributes.get("href") or "")
    own = html.replace(page.code[0], "")
    assert "url(" not in own and "@import" not in own
    policy = next(m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_only_our_scripts_are_allowed_to_run(run_directory):
    page = page_of(run_directory)
    assert len(page.code) == 2 and "plotly.js" in page.code[0][:200]
    policy = next(m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    hashes = {base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in page.code}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    assert "unsafe-inline" not in policy.split("style-src")[0]


def test_charts_are_never_offered_for_upload(run_directory):
    assert "sendChartToCloud" in page_of(run_directory).code[1]


def hostile(directory: Path) -> None:
    """Put the attack wherever text from outside ends up."""
    edit(
        directory / "summary.json",
        run=ATTACK,
        recipe=ATTACK,
        model=ATTACK,
        hook_point=ATTACK,
        sae={"architecture": ATTACK, "d_in": 1, "d_sae": 2},
        metrics={ATTACK: 0.5, "l0": ATTACK},
        headline=[ATTACK],
        losses={ATTACK: 1.0},
        seconds={ATTACK: 1.0},
        plugins=[{"name": ATTACK, "distribution": ATTACK, "version": ATTACK}],
        warnings=[ATTACK],
    )
    edit(directory / "provenance.json", **{ATTACK: [ATTACK], "nested": {ATTACK: {ATTACK: ATTACK}}})
    (directory / "run.toml").write_text(f"# {ATTACK}\n")
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(4):
            row = {"step": step, "loss": 1.0, f"loss/{ATTACK}": 1.0, f"weight/{ATTACK}": 1.0 + step, ATTACK: 2.0}
            file.write(json.dumps(row) + "\n")
    example = {
        "latent": 1,
        "rank": 0,
        "activation": 2.0,
        "before": ATTACK,
        "token": ATTACK,
        "after": ATTACK,
        "tokens": [ATTACK, ATTACK],
        "activations": [0.0, 2.0],
    }
    short = {key: value for key, value in example.items() if key not in ("tokens", "activations")} | {"latent": ATTACK}
    result = {
        "scalars": {ATTACK: ATTACK},
        "tables": {
            "examples": [example, short],
            "latents": [{"latent": 1, ATTACK: ATTACK}],
            ATTACK: [{ATTACK: ATTACK, "nested": [ATTACK]}],
        },
        "figures": {
            ATTACK: {
                "data": [{"type": "scatter", "name": ATTACK, "text": [ATTACK]}],
                "layout": {"title": {"text": ATTACK}},
            }
        },
        "files": [ATTACK, "javascript:alert(1)", "../../../etc/passwd"],
        "notes": [ATTACK],
    }
    home = directory / "analysis" / "<b onclick=alert(1)>"
    home.mkdir()
    (home / "result.json").write_text(json.dumps(result))


def test_hostile_text_stays_text(run_directory):
    hostile(run_directory)
    page = page_of(run_directory)
    assert len(page.code) == 2, "a script was smuggled in"
    assert not page.of("img")
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert not [a for a in page.of("a") if not re.match(r"#|analysis/features/latents\.csv", a["href"] or "")]
    # Shown as it is, in every place, and never evaluated as a template.
    assert page.text.count(ATTACK) > 20
    assert any(ATTACK in json.dumps(spec, ensure_ascii=False).replace('\\"', '"') for spec in page.data.values())


def test_figures_cannot_hold_links(run_directory):
    path = run_directory / "analysis" / "steer" / "result.json"
    link = '<a href="https://example.org">click</a> <b>bold</b> <A HREF="x">'
    edit(path, figures={"linked": {"data": [], "layout": {"title": {"text": link}}}})
    spec = next(s for s in page_of(run_directory).data.values() if "title" in s["layout"])
    assert not re.search(r"(?i)<\s*/?\s*a\b", spec["layout"]["title"]["text"])
    assert "<b>bold</b>" in spec["layout"]["title"]["text"]


def test_half_a_surrogate_pair_can_be_written(run_directory):
    edit(run_directory / "analysis" / "steer" / "result.json", notes=["token \ud83d cut in half"])
    assert "cut in half" in page_of(run_directory).text


def test_undefined_is_said_and_is_not_zero(run_directory):
    edit(run_directory / "summary.json", metrics={"ce_recovered": None}, headline=["ce_recovered"])
    html = write_report(run_directory).read_text(encoding="utf-8")
    card = re.search(r'<div class="card">.*?</div>', html, re.S).group(0)
    assert "not defined" in card and ">0<" not in card
    assert "not a number" in page_of_metrics(run_directory, math.nan)


def page_of_metrics(directory: Path, value: float) -> str:
    edit(directory / "summary.json", metrics={"explained_variance": value}, headline=[])
    return page_of(directory).text


def test_examples_are_highlighted_in_proportion_to_activation(run_directory):
    page = page_of(run_directory)
    shares = [float(m["style"].removeprefix("--share:")) for m in page.of("mark")]
    assert max(shares) == 1.0 and 0 < min(shares) < 0.5
    result = json.loads((run_directory / "analysis" / "features" / "result.json").read_text())
    rows = result["tables"]["examples"]
    positive = sum(a > 0 for row in rows for a in row["activations"])
    assert len(shares) == positive
    assert sum("peak" in (m.get("class") or "") for m in page.of("mark")) == len(rows)
    assert "def forward(self, x):⏎" in page.text


@pytest.mark.parametrize("missing", ["metrics.jsonl", "provenance.json", "run.toml", "summary.json"])
def test_a_missing_file_is_named_and_the_rest_is_shown(run_directory, missing):
    (run_directory / missing).unlink()
    page = page_of(run_directory)
    assert f"{missing} is missing" in page.text
    assert "Top activating examples" in page.text


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", '{"scalars": [], "tables": {"t": 3}, "figures": {"f": {}}}', "\x00\xff"]
)
def test_a_damaged_result_is_left_out_and_named(run_directory, content):
    (run_directory / "analysis" / "steer" / "result.json").write_text(content)
    page = page_of(run_directory)
    assert "analysis/steer/result.json" in page.text
    assert "Top activating examples" in page.text


def test_no_analysis_and_no_curves(tmp_path):
    (tmp_path / "run.toml").write_text("")
    page = page_of(tmp_path)
    assert "metrics.jsonl is missing" in page.text
    assert not page.data


def test_an_analyzer_known_only_to_the_summary_is_shown(run_directory):
    edit(run_directory / "summary.json", analysis={"elsewhere": {"found": 3}})
    assert "elsewhere" in page_of(run_directory).text


def test_half_a_line_is_skipped_and_damage_in_the_middle_is_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": NaN}\n{"step": 2, "lo')
    problems: list[str] = []
    assert [row["step"] for row in read_history(path, problems)] == [0, 1] and not problems
    path.write_text('{"step": 0}\ngarbage\n[3]\n{"step": 1}\n')
    assert [row["step"] for row in read_history(path, problems)] == [0, 1]
    assert "2 of 4 lines" in problems[0]


def test_what_is_not_finite_is_a_gap(tmp_path):
    rows = [
        {"step": 0, "loss": 1.0},
        {"step": 1, "loss": math.nan},
        {"step": 2},
        {"step": 3, "loss": None},
        {"step": 4, "loss": 2.0},
    ]
    figure = loss_figures(rows)["Total loss"]
    assert figure["data"][0]["y"] == [1.0, None, None, None, 2.0]


def test_a_zero_is_never_lost_on_a_logarithmic_axis():
    rows = [{"step": s, "loss": 1.0 + s, "loss/auxk": float(s > 3)} for s in range(6)]
    assert loss_figures(rows)["Each loss, before its weight"]["layout"]["yaxis"].get("type") != "log"
    assert loss_figures(rows)["Total loss"]["layout"]["yaxis"]["type"] == "log"


def test_long_histories_are_thinned_and_keep_both_ends():
    rows = [{"step": s} for s in range(12 * POINTS + 7)]
    kept = thinned(rows)
    assert POINTS / 2 < len(kept) <= POINTS + 1
    assert kept[0] is rows[0] and kept[-1] is rows[-1]
    assert thinned([]) == []


def test_a_long_table_says_what_it_leaves_out(run_directory):
    edit(run_directory / "analysis" / "steer" / "result.json", tables={"long": [{"i": i} for i in range(2500)]})
    page = page_of(run_directory)
    assert "The first 2,000 of 2,500 rows" in page.text


def test_a_failure_leaves_the_old_report_and_no_litter(run_directory, monkeypatch):
    path = write_report(run_directory)
    before = path.read_bytes()
    monkeypatch.setattr(
        "saekit.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(RunError, match=r"report\.html"):
        write_report(run_directory)
    assert path.read_bytes() == before
    assert not list(run_directory.glob(".*tmp"))


def test_the_same_run_gives_the_same_bytes(run_directory):
    assert write_report(run_directory).read_bytes() == write_report(run_directory).read_bytes()


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a run directory"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="no such directory"):
        read_run(tmp_path / "absent")


def test_neither_torch_nor_plotly_is_imported_before_it_is_needed():
    heavy = ("torch", "plotly", "jinja2")
    code = f"import sys, saekit.report, saekit.terminal.picture; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_constant_curve_is_drawn_at_its_value() -> None:
    """Plotly would draw it in the middle of an axis of its own choice."""
    from saekit.report.curves import loss_figures, measure_figures, overlaid

    history = [
        {"step": n, "l0": 32.0, "dead": 0, "grad_norm": -2.0, "loss": 0.5, "loss/mse": 0.5 / (n + 1), "lr": 3e-4 + n * 1e-16}
        for n in range(5)
    ]
    measures = {name: figure["layout"]["yaxis"] for name, figure in measure_figures(history).items()}
    assert measures["L0"] == {"range": [0.0, pytest.approx(38.4)]}
    assert measures["dead latents"] == {"range": [0.0, 1.0]}
    assert measures["gradient norm"] == {"range": [pytest.approx(-2.4), 0.0]}
    (rate,) = (axis for name, axis in measures.items() if name not in ("L0", "dead latents", "gradient norm"))
    assert rate["range"][0] == 0.0, "a difference by rounding is none"
    total, each = (figure["layout"]["yaxis"] for figure in loss_figures(history).values())
    assert total == {"range": [0.0, pytest.approx(0.6)]}
    assert each == {"type": "log"}
    other = [{**row, "l0": 16.0} for row in history]
    assert overlaid({"one": history}, ["l0"])["l0"]["layout"]["yaxis"] == measures["L0"]
    assert overlaid({"one": history, "other": other}, ["l0"])["l0"]["layout"]["yaxis"] == {}
