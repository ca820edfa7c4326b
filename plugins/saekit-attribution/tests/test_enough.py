"""`ablate`: which sets of latents it calls enough, with a model whose answers are written by the test."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from saekit_attribution.ablate.analyzer import Ablate
from saekit_attribution.ablate.experiment import AblationExperiment
from saekit_attribution.ablate.measures import BehaviourMeasurement
from saekit_attribution.ablate.questions import split
from saekit_attribution.labelled_data.document import LabelledData

from saekit import Result, RunContext
from saekit.plugins import Registry
from saekit.testing.tiny import finished_run

RANKED = 4
RANKINGS = {"exact": list(range(40)), "greedy": [*range(20, 48), *range(12)]}
EDITED = {(name, n): frozenset(latents[:n]) for name, latents in RANKINGS.items() for n in (10, 20, 40)}


class Edit(nullcontext):  # type: ignore[type-arg]
    """Stands in for the attachment of an edit, and knows which latents it ablates."""

    def __init__(self, latents: Sequence[int]) -> None:
        super().__init__()
        self.latents = frozenset(latents)


@dataclasses.dataclass
class Behaviour:
    """How the model answers. flagged, base: of how many questions there are in all, the answers of each class without an
    edit, and with the edit of a ranking's first latents on the questions of the curve and on those of the test; any other
    edit changes nothing."""

    flagged: Callable[[tuple[str, int] | None, str, int], list[str]]
    base: Callable[[tuple[str, int] | None, str, int], list[str]]


def answered(**classes: int) -> list[str]:
    return [name for name, count in classes.items() for _ in range(count)]


def document(n: int, **metadata: Any) -> dict[str, Any]:
    """`n` questions; a prompt begins with "+" in the variation, and holds its number."""
    results = []
    for number in range(n):
        variations = [
            {"template_type": "base", "prompt": f"{number}?", "response": "b", "sycophancy_flag": 0},
            {"template_type": "like", "prompt": f"+{number}?", "response": "a", "sycophancy_flag": 1},
        ]
        results.append({"variations": variations})
    return {"metadata": metadata, "results": results}


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    found = finished_run(("subject_model", "tokens"), Registry()).context
    return dataclasses.replace(found, directory=tmp_path)


@pytest.fixture
def ablated(context: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The result of `ablate` on a model that behaves as told."""

    def run(model: Behaviour, n: int = 50, **options: Any) -> Result:
        labelled = document(RANKED + 2 * n, **options.pop("metadata", {}))
        path = tmp_path / "labelled.json"
        path.write_text(json.dumps(labelled), encoding="utf-8")
        _, curve, _ = split(LabelledData(labelled, "test"), RANKED, context.seed)

        def answers(self: BehaviourMeasurement, prompts: Sequence[tuple[int, ...]], edit: Edit | None) -> list[str]:
            texts = self.subject.tokenizer.batch_decode(prompts, skip_special_tokens=True)
            known = None if edit is None else next((k for k, latents in EDITED.items() if latents == edit.latents), None)
            part = "curve" if int(texts[0].strip("+? ")) in curve else "test"
            kind = model.flagged if texts[0].lstrip().startswith("+") else model.base
            return kind(known, part, n)[: len(prompts)]

        judges = ModuleType("judges_of_the_test")
        judges.of_answer = lambda prompt, response, kind: response  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, judges.__name__, judges)
        monkeypatch.setattr(BehaviourMeasurement, "edit", lambda self, latents: Edit(latents) if latents else None)
        monkeypatch.setattr(BehaviourMeasurement, "answers", answers)
        monkeypatch.setattr(AblationExperiment, "_rankings", lambda self: dict(RANKINGS))
        fixed = {"numbers": [10, 20, 40], "rank_samples": RANKED, "damage_tokens": 50, "draws": 2, "max_new_tokens": 3}
        return Ablate(data=str(path), judge="judges_of_the_test:of_answer", **fixed, **options)(context)

    return run


def neutral_but(before: list[str], curve: dict[tuple[str, int], list[str]], test: dict[tuple[str, int], list[str]]) -> Behaviour:
    """Variations are answered as written, and base prompts always neutrally."""
    parts = {"curve": curve, "test": test}
    return Behaviour(
        lambda edit, part, n: before if edit is None else parts[part].get(edit, before), lambda *_: answered(neutral=50)
    )


# --- the search ---------------------------------------------------------------------------------------------------------

POOR = answered(like=25, neutral=20, other=5)
CURVE = {
    ("exact", 10): answered(like=1, neutral=45, other=4),
    ("greedy", 20): answered(like=3, neutral=46, other=1),
    ("greedy", 40): answered(neutral=49, other=1),
    **dict.fromkeys([("exact", 20), ("exact", 40), ("greedy", 10)], POOR),
}
TEST = {**CURVE, ("exact", 10): answered(like=7, neutral=40, other=3)}


@pytest.mark.parametrize(
    ("options", "tries"),
    [
        # By the bounds of its interval the set of 10 is not promising: the search begins with 20, which is too close.
        ({}, [("greedy", 20, False), ("greedy", 40, True)]),
        # With a wider limit it is, fails its test, and the search goes on.
        ({"at_least_neutral": 0.75}, [("exact", 10, False), ("greedy", 20, True)]),
    ],
)
def test_a_set_that_fails_its_test_does_not_end_the_search(
    ablated: Callable[..., Result], options: dict[str, Any], tries: list[tuple[str, int, bool]]
) -> None:
    """10 latents by `exact` passed on the curve (0.02, 0.90) and failed the test (0.14, 0.80); joint selection had sets that
    were enough, with 20 (0.06, 0.92) and 40 (0.00, 0.98), and no set was said to be."""
    result = ablated(neutral_but(answered(like=50), CURVE, TEST), **options)
    assert result.scalars["like_enough"] == 1
    assert result.scalars["like_latents"] == tries[-1][1]
    rows = result.tables["tries"]
    assert [(row["ranking"], row["latents"], row["enough"]) for row in rows] == tries
    assert result.scalars["like_tries"] == len(tries)
    planned = 2 if not options else 3
    assert result.scalars["like_confidence"] == pytest.approx(1 - 0.05 / planned)
    assert f"{len(tries)} of at most {planned} were tested" in result.notes[0]


def test_no_more_sets_are_tested_than_asked_for_and_the_test_does_not_choose(ablated: Callable[..., Result]) -> None:
    good = answered(neutral=50)
    curve = dict.fromkeys(EDITED, good)
    test = {**dict.fromkeys(EDITED, POOR), ("exact", 40): good}
    result = ablated(neutral_but(answered(like=50), curve, test), tries=2)
    assert len(result.tables["tries"]) == 2
    assert (result.scalars["like_enough"], result.scalars["like_latents"]) == (0, 10)
    assert "no set of at most 40 latents was shown to be enough" in result.notes[0]
    assert "6 sets looked enough on the curve, and 2 of at most 2 were tested" in result.notes[0]


# --- relative to before ---------------------------------------------------------------------------------------------------


def helped(edit: tuple[str, int] | None) -> bool:
    return edit == ("greedy", 20)


@pytest.mark.parametrize(
    ("rest", "edited_base"), [("other", {"neutral": 48, "other": 8}), ("like", {"neutral": 56})]
)
def test_controls_that_begin_at_6_of_7_can_be_kept(
    ablated: Callable[..., Result], rest: str, edited_base: dict[str, int]
) -> None:
    """Before the edit 48 of 56 base prompts have a neutral answer, and the others one of another class, or the behaviour."""
    edited = answered(**edited_base)
    result = ablated(
        Behaviour(
            lambda edit, part, n: edited if helped(edit) else answered(like=56),
            lambda edit, part, n: edited if helped(edit) else answered(neutral=48, **{rest: 8}),
        ),
        n=56,
    )
    assert (result.scalars["like_enough"], result.scalars["like_latents"]) == (1, 20)
    assert result.scalars["like_kept_after_n"] == (48 if rest == "like" else 56)
    assert (result.scalars["like_kept_after"], result.scalars["like_neutral_after"]) == (1.0, 1.0)


def test_base_answers_need_not_be_alike(ablated: Callable[..., Result]) -> None:
    own = [f"answer {number}" for number in range(50)]
    result = ablated(
        Behaviour(lambda edit, part, n: own if helped(edit) else answered(like=50), lambda *_: own),
    )
    assert (result.scalars["like_enough"], result.scalars["like_latents"]) == (1, 20)
    assert (result.scalars["like_neutral_after"], result.scalars["like_kept_after"]) == (1.0, 1.0)


def test_a_behaviour_that_was_never_there_is_no_success(ablated: Callable[..., Result]) -> None:
    """Base prompts are answered like that about as often, so there is nothing that an edit could end."""
    after, seldom, base = answered(neutral=50), answered(like=7, neutral=43), answered(like=6, neutral=44)
    result = ablated(
        Behaviour(
            lambda edit, part, n: after if helped(edit) else answered(like=9, neutral=41) if part == "curve" else seldom,
            lambda edit, part, n: after if helped(edit) else base,
        ),
    )
    assert result.scalars["like_enough"] == 0 and "curve" not in result.tables
    assert "the flagged behaviour is absent before the edit" in result.notes[-1]
    assert "0.14 (0.07 to 0.26, of 50)" in result.notes[-1] and "0.12 (0.06 to 0.24, of 50)" in result.notes[-1]


# --- what stands beside a share ---------------------------------------------------------------------------------------------


def test_each_share_has_its_questions_and_its_interval(ablated: Callable[..., Result]) -> None:
    result = ablated(neutral_but(answered(like=50), CURVE, TEST))
    row = next(row for row in result.tables["curve"] if (row["ranking"], row["latents"]) == ("exact", 10))
    assert [row[f"{name}_n"] for name in ("rate", "remaining", "neutral", "kept")] == [50] * 4
    # By hand: (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n) with p = 0.9, n = 50, z = 1.96.
    assert (row["neutral"], row["neutral_low"], row["neutral_high"]) == pytest.approx((0.9, 0.7864, 0.9565), abs=1e-4)
    scalars = result.scalars
    for name in ("rate_before", "rate_after", "remaining_after", "neutral_after", "kept_after", "random_worst"):
        assert scalars[f"like_{name}_low"] <= scalars[f"like_{name}"] <= scalars[f"like_{name}_high"]
        assert scalars[f"like_{name}_n"] == 50
    figure = result.figures["like_curve"]["data"][0]
    assert figure["error_y"]["array"][1] == pytest.approx(row["rate_high"] - row["rate"])


def test_few_questions_are_told_loudly_and_cannot_succeed(ablated: Callable[..., Result]) -> None:
    n = 9
    result = ablated(neutral_but(answered(like=n), *[{("greedy", 20): answered(neutral=n)}] * 2), n=n)
    assert result.scalars["like_enough"] == 0
    assert "ONLY 9 questions to choose on, ONLY 9 questions to test on" in result.notes[0]
    assert "no set can be shown to be enough, even if every answer were as it should be" in result.notes[1]
    assert "of ONLY 9)" in result.notes[2]


def test_a_file_that_cannot_be_split_is_refused(ablated: Callable[..., Result], context: RunContext, tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    path.write_text(json.dumps(document(2)), encoding="utf-8")
    result = Ablate(data=str(path))(context)
    assert result.scalars == {} and "2 different questions leave none to rank by" in result.notes[0]


def test_random_latents_that_do_as_much_are_told(ablated: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    edits = {**EDITED, ("random", 0): frozenset([63])}
    monkeypatch.setitem(EDITED, ("random", 0), edits["random", 0])
    monkeypatch.setattr("saekit_attribution.ablate.experiment.matched_latents", lambda *_: [63])
    good = answered(neutral=50)
    result = ablated(neutral_but(answered(like=50), {("exact", 10): good}, {("exact", 10): good, ("random", 0): good}))
    assert result.scalars["like_enough"] == 1
    assert "The share of answers with the flagged behaviour of 0 does not fall below its controls" in result.notes[-1]
    assert result.notes[-1].endswith("The effect is not specific to these latents.")


# --- words ------------------------------------------------------------------------------------------------------------


def test_the_behaviour_is_named_by_the_option_or_the_file(ablated: Callable[..., Result]) -> None:
    told = neutral_but(answered(like=50), CURVE, TEST)
    for named, options in {
        "the old capital": {"behaviour": "the old capital"},
        "flattery": {"metadata": {"behaviour": "flattery"}},
        "the flagged behaviour": {},
    }.items():
        result = ablated(told, **options)
        assert f"{named} goes from 1.00" in result.notes[0]
        assert "preference" not in json.dumps(result.to_json())


# --- the split ----------------------------------------------------------------------------------------------------------


def test_repeated_prompts_stay_on_one_side(context: RunContext, tmp_path: Path) -> None:
    """Each question stands in the file three times, with other white space, once with another question's variation."""
    labelled = document(12)
    for number, result in enumerate(document(12)["results"] * 2):
        base, like = result["variations"]
        base["prompt"] = f"  {base['prompt']}\n\n" if number % 2 else base["prompt"].replace("?", " ?").replace(" ?", "?")
        like["prompt"] += f" again, {number}"
        labelled["results"].append({"variations": [dict(base), dict(like)]})
    for seed in range(5):
        parts = split(LabelledData(labelled, "test"), 4, seed)
        assert set().union(*parts) == set(range(36))
        texts = [{" ".join(labelled["results"][i]["variations"][0]["prompt"].split()) for i in part} for part in parts]
        assert [len(part) for part in texts] == [4, 4, 4]
        assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]


def test_a_repeated_question_counts_once(ablated: Callable[..., Result], context: RunContext, tmp_path: Path) -> None:
    labelled = document(20)
    labelled["results"] *= 2
    path = tmp_path / "twice.json"
    path.write_text(json.dumps(labelled), encoding="utf-8")
    result = Ablate(data=str(path), rankings=["exact"], numbers=[2], damage_tokens=50, rank_samples=4)(context)
    assert result.scalars["like_rate_before_n"] == 8
