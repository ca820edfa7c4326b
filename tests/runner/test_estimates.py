"""What metrics and analyzers say beside their numbers reaches summary.json, the terminal and the report."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from saekit import Component, Estimate, Result, wilson_interval
from saekit.terminal.summary import render_summary
from saekit.testing import registry_of, tiny_run


class Right:
    """7 of 8 questions were answered."""

    headline = ("right",)
    meanings = {"right": "share of right answers", "chance": "a guess", "plain": "a number"}  # noqa: RUF012
    undefined = {"chance": "nobody guessed"}  # noqa: RUF012

    def update(self, step):
        pass

    def compute(self):
        right = Estimate(7 / 8, wilson_interval(7, 8), {"questions": 8}, "Only 8 questions were asked.")
        return {"right": right, "chance": Estimate(None), "plain": 1.5}


def compares(context):
    """An effect with its controls."""
    return Result(scalars={"gain": 1.0}, notes=["The gain of 1 does not exceed its controls."])


def test_an_estimate_and_a_note_are_in_the_summary_the_terminal_and_the_report(tmp_path: Path) -> None:
    registry = registry_of(
        metric=Component("right", Right, "Right answers."), analyzer=Component("compares", compares, "Compares.")
    )
    run = tiny_run(
        tmp_path / "run",
        registry=registry,
        metric=[{"use": "right"}],
        analyzer=[{"use": "compares"}],
        variant=[{"name": "a"}, {"name": "b", "training": {"seed": 1}}],
    )
    assert run.summary["estimates"] == run.summary["analysis_notes"] == {}  # of no single SAE
    for one in run.summary["variants"].values():
        assert (one["metrics"]["right"], one["metrics"]["chance"], one["metrics"]["plain"]) == (7 / 8, None, 1.5)
        low, high = wilson_interval(7, 8)
        note = "Only 8 questions were asked."
        assert one["estimates"] == {"right": {"interval": [low, high], "n": {"questions": 8}, "note": note}}
        assert one["analysis_notes"] == {"compares": ["The gain of 1 does not exceed its controls."]}
    assert any("chance (nobody guessed)" in text for text in run.summary["warnings"])
    console = Console(file=io.StringIO(), width=120, color_system=None)
    render_summary(run.summary, console)
    text = console.file.getvalue()
    assert text.count("0.8750 (0.529 to 0.978)") == 2
    assert "a, right: Only 8 questions were asked." in text and "b, compares: The gain of 1 does not" in text
    page = (run.directory / "variants" / "a" / "report.html").read_text(encoding="utf-8")
    assert "95%: 0.529 to 0.978" in page and "on 8 questions" in page and page.count("Only 8 questions were asked.") == 2
    assert "0.529 to 0.978" in (run.directory / "report.html").read_text(encoding="utf-8")
