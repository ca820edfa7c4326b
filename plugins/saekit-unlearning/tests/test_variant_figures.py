"""The figures over the variants of a run show what was planted: each score with its reason, each loss, each threshold."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgba
from saekit_unlearning.print_figures import losses, scores, thresholds
from saekit_unlearning.variant_figures import unlearning_figures
from saekit_unlearning.variant_table import OURS, SAEBENCH, Score, Variant, variant_of

from saekit import Compared, Component, Result
from saekit.testing import TinyRun, registry_of, tiny_run

REASON = "No latent was a candidate, so nothing was edited."


def method(name: str, path: str, saebench: float, score: float, **more: Any) -> dict[str, Any]:
    reason = {"reason_of_zero": None if saebench else REASON}
    return {"method": name, "path": path, "saebench_score": saebench, "score": score, "within_bound": True, **reason, **more}


METHODS = {
    # Of two methods, `good` is what the seen wordings chose; `lucky` is better on the unseen ones.
    "works": [
        method("good", "spliced", 0.6, 0.5, score_low=0.4, score_high=0.6),
        method("lucky", "spliced", 0.1, 0.9),
        method("good", "error_kept", 0.2, 0.0, within_bound=False),
    ],
    "nothing": [method("good", "model", 0.0, 0.0, candidates=0)],
    "zero": [method("good", "spliced", 0.0, 0.0), method("good", "error_kept", 0.0, 0.0)],
}


def planted_unlearn(context: Any, *, of: str = "zero") -> Result:
    """What the analyzer `unlearn` would say."""
    if of == "fails":
        raise ValueError("no model")
    return Result(tables={"methods": METHODS[of]}, headline=["score_good_spliced"])


def planted_importance(context: Any) -> Result:
    """What the callback `importance` would say."""
    return Result(scalars={"threshold": 0.01, "above": 12, "living": 60})


REGISTRY = registry_of(analyzer=[Component("planted", planted_unlearn), Component("threshold", planted_importance)])
UNLEARN = {"use": "planted", "name": "unlearn"}
VARIANTS = [
    {"name": "works", "analyzer": [{**UNLEARN, "of": "works"}, {"use": "threshold", "name": "importance"}]},
    {"name": "zero", "analyzer": [UNLEARN]},
    {"name": "bare", "analyzer": []},
    {"name": "nothing", "analyzer": [{**UNLEARN, "of": "nothing"}]},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    comparison = [{"use": "unlearning_figures"}]
    return tiny_run(tmp_path_factory.mktemp("figures") / "run", registry=REGISTRY, comparison=comparison, variant=VARIANTS)


@pytest.fixture(scope="module")
def variants(run: TinyRun) -> list[Variant]:
    return [variant_of(name, one, unlearn="unlearn", importance="importance") for name, one in run.together.variants.items()]


def test_the_table_holds_what_was_planted(run: TinyRun) -> None:
    result = unlearning_figures(run.together)
    works, zero, bare, nothing = result.tables["variants"]
    assert (works["saebench_spliced"], works["saebench_error_kept"]) == (0.6, 0.2)
    assert (works["ours_spliced"], works["method_spliced"]) == (0.5, "good")  # not the one that only the unseen wordings favour
    assert (works["ours_spliced_low"], works["ours_spliced_high"]) == (0.4, 0.6)
    assert "so none was chosen" in works["reason_of_zero"]
    assert (works["threshold"], works["latents_above"], works["latents_living"]) == (0.01, 12, 60)
    assert REASON in zero["reason_of_zero"]
    assert zero["threshold"] is None
    assert nothing["saebench_spliced"] == nothing["ours_error_kept"] == 0.0
    assert nothing["reason_of_zero"] == REASON
    assert bare["saebench_spliced"] is None
    assert "no result of 'unlearn'" in bare["reason_of_zero"]
    assert works["explained_variance"] == run.summary["variants"]["works"]["metrics"]["explained_variance"]
    assert "SAEBench's score, error kept: works is highest with 0.20, the next 0.00." in result.notes
    assert any("works is highest with 0.50 (0.40 to 0.60)" in note for note in result.notes)
    assert result.scalars["ours_works_spliced"] == 0.5


def test_one_that_failed_says_so(tmp_path: Path) -> None:
    one = Compared(context_of(tmp_path), {"metrics": {}, "failed": {"analyzer.unlearn": "there is no model."}})
    found = variant_of("v", one, unlearn="unlearn", importance="importance")
    assert found.scores[OURS, "spliced"] == Score(None, reason="unlearn failed: there is no model.")
    assert found.threshold is None
    assert not found.losses


def context_of(place: Path) -> Any:
    from types import SimpleNamespace

    (place / "run.toml").touch()
    return SimpleNamespace(directory=place, config=SimpleNamespace(comparison=[]))


def test_the_files_are_for_print(run: TinyRun) -> None:
    place = run.directory / "analysis" / "unlearning_figures"
    for name in ("unlearning_scores.png", "training_losses.png", "feature_thresholds.png"):
        content = (place / name).read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert width == 2100  # 7 inches of 300 dots
        assert 600 < height < 2400
        metre = struct.unpack(">I", content[content.index(b"pHYs") + 4 :][:4])[0]
        assert round(metre * 0.0254) == 300
    report = (run.directory / "report.html").read_text(encoding="utf-8")
    assert 'href="analysis/unlearning_figures/unlearning_scores.png"' in report
    assert "feature thresholds" in report


def texts(figure: Any) -> str:
    return "\n".join(t.get_text() for part in (figure, *figure.axes) for t in part.texts)


def test_a_bar_of_zero_is_a_line_and_has_its_reason(variants: list[Variant]) -> None:
    figure = scores(variants)
    upper = figure.axes[0]
    bars = {(round(bar.get_x() + bar.get_width() / 2), number): bar for number, c in enumerate(upper.containers) for bar in c}
    assert [bars[i, 0].get_height() for i in range(3)] == [0.6, 0.0, 0.0]
    assert bars[1, 0].get_linewidth() > 2
    assert bars[1, 0].get_edgecolor() == bars[1, 0].get_facecolor()
    assert bars[2, 0].get_linewidth() == 0  # nothing was measured, which is not a zero
    written = texts(figure)
    assert REASON in written
    assert "There is no result of 'unlearn'." in written
    assert "Whiskers: 95%" in written
    assert [t.get_text() for t in upper.texts if t.get_text().startswith("–")]


def test_the_losses_have_a_line_a_variant_and_one_term_that_compares(variants: list[Variant]) -> None:
    total, shared = losses(variants, 32).axes
    assert [line.get_label() for line in total.lines] == ["works", "zero", "bare", "nothing"]
    assert {line.get_alpha() for line in (*total.lines, *shared.lines)} == {0.7}
    assert len({to_rgba(line.get_color()) for line in total.lines}) == 4
    assert "mse" in shared.get_title()
    steps, values = total.lines[0].get_data()
    assert list(steps) == list(range(1, 13))
    assert list(values) == [value for _, value in variants[0].losses["loss"]]
    assert "32 activations" in total.get_xlabel()


def test_a_threshold_is_a_bar_and_none_is_told(variants: list[Variant]) -> None:
    figure = thresholds(variants)
    (axis,) = figure.axes
    assert [bar.get_height() for bar in axis.containers[0]] == [0.01, 0.0, 0.0, 0.0]
    assert "12 of\n60 latents" in texts(figure)
    assert texts(figure).count("no threshold") == 3


def test_many_reasons_have_letters_of_their_own() -> None:
    def variant(n: int) -> Variant:
        both = {(s, p): Score(0.0, reason=f"Reason {n} {s} {p}.") for s in (SAEBENCH, OURS) for p in ("spliced", "error_kept")}
        return Variant(f"v{n}", both, None, None, None, {}, {})

    figure = scores([variant(n) for n in range(8)])
    marks = [t.get_text() for axis in figure.axes for t in axis.texts]
    assert len(marks) == len(set(marks)) == 32
    assert all(f"Reason {n} {OURS} spliced." in texts(figure) for n in range(8))
    assert "nothing was trained" in texts(losses([variant(0)], 1))
