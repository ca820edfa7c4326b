"""Baselines by name, and relearning, as parts of the analyzer's result, on the planted world."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import plotly.graph_objects
import pytest
import torch
from pydantic import TypeAdapter
from saekit_unlearning.data import UnlearningData
from saekit_unlearning.edited import Edited
from saekit_unlearning.methods import Prepared, Seen, Trial
from saekit_unlearning.passages import Passages, Site
from saekit_unlearning.relearning import halves
from saekit_unlearning.unlearn import Unlearn

from saekit import OptionError, Result, UsageError

OPTIONS = {"numbers": [6], "clamps": [], "rms_clamps": [], "draws": 0}
FIRST, PUSH = 21, 4.003
"""The token of the first value, and how far it is pushed for every forgotten entity: a little above the logit of what they know."""


@pytest.fixture
def directory(planted, tmp_path: Path) -> Path:
    table = TypeAdapter(UnlearningData).dump_python(planted.data(), mode="json")
    for kind in ("texts", "questions"):
        (tmp_path / f"{kind}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in table[kind]), encoding="utf-8")
    return tmp_path


@pytest.fixture
def analyse(planted, directory: Path):
    def run(subject=None, seed: int = 0, **options) -> Result:
        context = planted.context(subject)
        context.seed = seed
        return Unlearn(data=str(directory), **{**OPTIONS, **options})(context)

    return run


def push(planted, passages: Passages) -> torch.Tensor:
    """Adds one direction, the same for all, at the entities to be forgotten. The head reads it as the first value."""
    x = passages.x
    return passages.with_x(x + x[:, : planted.each].sum(1, keepdim=True) * torch.eye(x.shape[1], dtype=x.dtype)[-1])


class Pushed:
    """One push hides all facts: whoever learns to ignore it for some has all of them back."""

    name = "pushed"

    def __init__(self, planted) -> None:
        self.planted = planted

    def prepare(self, seen: Seen) -> Prepared:
        edited = Edited("a push", seen.site, edit=partial(push, self.planted))
        return Prepared(None, [Trial(edited.label, None, edited.logits, edited=edited)])


class Opaque(Pushed):
    """The same as an edit that gives no model."""

    name = "opaque"

    def prepare(self, seen: Seen) -> Prepared:
        (trial,) = super().prepare(seen).trials
        return Prepared(None, [Trial(trial.label, None, trial.logits)])


class Never:
    """Stands for the oracle: the planted model without what is to be forgotten."""

    def __init__(self, planted) -> None:
        self.subject = planted.subject(known=planted.entities[planted.each :])

    def at(self, site: Site) -> Edited:
        return Edited("never", Site(self.subject, site.trained), changed=True)


@pytest.fixture
def pushable(planted):
    subject = planted.subject()
    with torch.no_grad():
        subject.model.head.weight[FIRST, -1] = PUSH
    return subject


def only(monkeypatch, *methods, oracle=None) -> None:
    monkeypatch.setattr(Unlearn, "_methods", lambda self: list(methods))
    monkeypatch.setattr(Unlearn, "_baselines", lambda self: ({}, oracle))


def row(result: Result, method: str, path: str = "model", table: str = "relearning") -> dict:
    (found,) = (r for r in result.tables[table] if (r["method"], r["path"]) == (method, path))
    return found


def test_baselines_stand_in_the_same_tables(analyse) -> None:
    few = {"rates": [0.05], "checkpoints": [150]}
    result = analyse(methods=["sparsity", "difference_of_means", "npo"], baselines={"npo": few})
    assert [r["path"] for r in result.tables["methods"]] == ["spliced", "error_kept", "model", "model"]
    tuned = row(result, "npo", table="methods")
    assert tuned["candidates"] is None and tuned["settings"] == 1 and "controls" not in tuned
    assert tuned["forget"] == 0 and tuned["near_shown"] == 1
    assert row(result, "difference_of_means", table="methods")["settings"] == 16
    assert result.notes[2].startswith("Without the SAE, ")
    assert {"score_npo_model", "score_difference_of_means_model"} <= set(result.scalars)
    assert "relearning" not in result.tables


def test_what_one_push_hid_comes_back_with_the_half_that_is_relearned(
    analyse, planted, pushable, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One of each value is relearned, so that each is known to be no longer pushed aside.
    values = (({int(entity[-1]) % 3 for entity in halves(planted.data(), seed)[0]}, seed) for seed in range(20))
    seed = next(seed for found, seed in values if len(found) == 3)
    only(monkeypatch, Pushed(planted), oracle=Never(planted))
    result = analyse(subject=pushable, seed=seed, relearn=50)
    found = row(result, "pushed")
    assert found["within_bound"]
    assert found["other_half_0"] == found["trained_half_0"] == 0
    assert found["other_half_50"] == found["trained_half_50"] == 1
    assert found["other_half_n"] == planted.each / 2
    assert found["back_after"] in (5, 10, 20)
    assert found["gain_low"] > 0
    assert found["beyond_oracle_low"] > 0
    assert found["above_oracle_low"] > 0
    assert found["edit_taken_away"] == 1
    (said,) = (note for note in result.notes if "hides the facts rather than removing them" in note)
    assert said.startswith("pushed, no SAE (a push) hides")
    (taken,) = (note for note in result.notes if note.startswith("Edits at the site leave the weights as they were"))
    assert "pushed, no SAE" in taken
    assert "1.00 of the other half without a step" in taken
    assert result.scalars["relearn_gain_pushed_model"] == found["gain"]
    figure = result.figures["relearning"]
    plotly.graph_objects.Figure(figure)
    assert [line["name"] for line in figure["data"]] == ["pushed, no SAE", "the oracle (never knew them)", "edit taken away"]
    assert figure["data"][1]["y"][0] == 0


@pytest.mark.parametrize("path", ["spliced", "error_kept"])
def test_an_ablated_fact_is_relearned_alone_and_is_back_without_the_edit(
    analyse, planted, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Nothing of one fact helps another here: an edit in place holds, and is not said to hide. Without it all are back."""
    result = analyse(methods=["sparsity"], relearn=3)
    found = row(result, "sparsity", path)
    assert [found[f"other_half_{step}"] for step in (0, 1, 2, 3)] == [0, 0, 0, 0]
    assert "other_half_5" not in found
    assert found["edit_taken_away"] == 1
    assert "beyond_oracle" not in found
    assert sum("Without a model that never knew the facts this tells nothing" in note for note in result.notes) == 2
    assert not any("hides the facts rather" in note for note in result.notes)
    assert any("whoever takes the edit away has the facts back at once" in note for note in result.notes)


def test_steps_end_at_what_was_asked_for(analyse) -> None:
    found = row(analyse(methods=["sparsity"], relearn=7), "sparsity", "error_kept")
    assert [key for key in found if key.startswith("other_half_") and key[-1].isdigit()] == [
        f"other_half_{step}" for step in (0, 1, 2, 5, 7)
    ]


def test_a_method_that_gives_no_model_is_named(analyse, planted, pushable, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, Opaque(planted))
    result = analyse(subject=pushable, relearn=1)
    assert result.tables["relearning"] == []
    assert any(note.startswith("Relearning was not tried on opaque, no SAE") for note in result.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"baselines": {"rmu": {"norms": [1.0]}}}, "options of rmu, which is not among methods"),
        ({"methods": ["rmu"], "baselines": {"rmu": {"norm": [1.0]}}}, "rmu has no option 'norm'. Its options: alpha, blocks"),
        ({"methods": ["npo"], "baselines": {"npo": {"rates": [-1.0]}}}, r"npo\.rates\.0 = -1\.0: .*greater than 0"),
        ({"methods": ["oracle"]}, "there is no oracle for data = "),
    ],
)
def test_bad_options_of_baselines_are_refused_when_the_run_is_planned(directory: Path, options: dict, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Unlearn(data=str(directory), **options)


def test_one_entity_cannot_be_halved(planted, directory: Path) -> None:
    table = TypeAdapter(UnlearningData).dump_python(planted.data(), mode="json")
    for kind in ("texts", "questions"):
        some = [one for one in table[kind] if one["group"] != "forget" or one["entity"] == "forget0"]
        (directory / f"{kind}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in some), encoding="utf-8")
    Unlearn(data=str(directory)).prepare(planted.context())
    with pytest.raises(UsageError, match="only 'forget0' is to be forgotten, and relearning needs one half to learn"):
        Unlearn(data=str(directory), relearn=5).prepare(planted.context())


def test_lora_without_peft_is_refused_when_the_run_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(OptionError, match=r"methods: lora needs peft\. Install it: pip install 'saekit-unlearning\[lora\]'"):
        Unlearn(methods=["lora"])


def test_the_organism_has_an_oracle_and_it_is_no_method_to_choose() -> None:
    names = [method.name for method in Unlearn(methods=["oracle", "npo"])._methods()]
    assert names == ["oracle", "npo"]
