"""The analyzer on the planted world: it finds what is there, tells the paths apart, and refuses what cannot be unlearned."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import plotly.graph_objects
import pytest
import torch
from pydantic import TypeAdapter
from saekit_unlearning.damage import damage
from saekit_unlearning.data import UnlearningData
from saekit_unlearning.edits import Clamp
from saekit_unlearning.methods import Prepared, Seen, Trial
from saekit_unlearning.unlearn import Unlearn

from saekit import ComponentError, OptionError, UsageError

OPTIONS = {"numbers": [2, 100], "clamps": [], "rms_clamps": [], "draws": 3}


def write(table: dict, place: Path) -> None:
    for kind in ("texts", "questions"):
        (place / f"{kind}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in table[kind]), encoding="utf-8")


@pytest.fixture
def analyse(planted, tmp_path):
    """From options, the changed data and the model, the analyzer's result."""

    def run(change=lambda table: None, subject=None, **options):
        table = TypeAdapter(UnlearningData).dump_python(planted.data(), mode="json")
        change(table)
        write(table, tmp_path)
        return Unlearn(data=str(tmp_path), **{**OPTIONS, **options})(planted.context(subject))

    return run


def row(result, method: str, path: str) -> dict:
    (found,) = (r for r in result.tables["methods"] if (r["method"], r["path"]) == (method, path))
    return found


@pytest.mark.parametrize("path", ["spliced", "error_kept"])
@pytest.mark.parametrize("method", ["sparsity", "attribution", "greedy"])
def test_planted_facts_are_forgotten_and_no_others(analyse, planted, method: str, path: str) -> None:
    found = row(analyse(methods=[method]), method, path)
    assert found["candidates"] == planted.each and found["setting"].startswith(f"{planted.each} latents")
    assert found["saebench_score"] == found["score"] == found["area"] == 1
    assert found["forget"] == 0 and found["forget_n"] == planted.each
    for group in ("near_shown", "near_never_shown", "far_shown", "far_never_shown"):
        assert found[group] == 1 and found[f"{group}_n"] == planted.each / 2
    assert found["exceeds_controls"] and found["controls_mean"] == 0
    assert found["kl_held_out"] > 0 and found["tokens_held_out"] == 6  # its text names two of these entities
    assert found["reason_of_zero"] is None and 0 < found["score_low"] < found["score_high"] == 1


def test_the_kept_error_undoes_it_and_the_splice_alone_forgets(analyse, planted) -> None:
    """Where no latent rebuilds the facts: with the error kept nothing can be forgotten, and the splice forgets by itself."""
    result = analyse(subject=planted.subject(hidden=planted.entities[: planted.each]), methods=["sparsity"])
    kept, spliced = (row(result, "sparsity", path) for path in ("error_kept", "spliced"))
    assert spliced["forget"] == 0 and spliced["score"] == 1
    assert spliced["forget_unedited_splice"] == 0 and spliced["score_unedited_splice"] == 1
    assert "Without any edit the reconstruction leaves 0.00" in result.notes[0]
    assert not spliced["exceeds_controls"]  # whatever is edited, since the splice alone does it
    assert kept["score"] == kept["saebench_score"] == 0
    assert "changed nothing" in kept["reason_of_zero"]
    assert result.tables["unedited"][1]["forget"] == 0


def test_the_kept_error_is_named_where_the_edit_does_something(analyse, planted) -> None:
    """The same with a push that moves logits, not answers: the edited latents' rows favour one value a little."""
    subject = planted.subject(hidden=planted.entities[: planted.each])
    with torch.no_grad():
        subject.model.head.weight[-1, : planted.each] += 0.1
    found = row(analyse(subject=subject, methods=["sparsity"]), "sparsity", "error_kept")
    assert "error, which is kept, puts the knowledge back" in found["reason_of_zero"]


def test_what_splicing_breaks_is_told(analyse, planted) -> None:
    """Facts to stay that the SAE does not rebuild are lost by the splice before any edit."""
    result = analyse(subject=planted.subject(hidden=planted.entities[planted.each :]), methods=["attribution"])
    assert (
        "The reconstruction alone, before any edit, keeps 0.00"
        in row(result, "attribution", "spliced")["reason_of_zero"]
    )
    assert row(result, "attribution", "error_kept")["score"] == 1


def test_damage_to_what_was_never_shown_lowers_our_score(analyse, planted) -> None:
    """A latent that a fact to be forgotten shares with entities never shown: the choice cannot see it, the report does."""
    subject, data = planted.subject(), planted.data().divided(0.5, 0)
    hidden = [i for i, e in enumerate(planted.entities) if e.startswith("near") and e not in data.shown]
    weight, head = subject.model.embed.weight, subject.model.head.weight
    with torch.no_grad():
        for i in hidden:  # they take over the direction of an entity that is to be forgotten, with a value of their own
            word = 3 + i
            weight[word] = 0
            weight[word, 0] = 1.0
            head[:, i] = 0
    value = 1 + 0 % 3
    found = row(analyse(subject=subject, methods=["sparsity"]), "sparsity", "error_kept")
    right_before = [i for i in hidden if 1 + i % 3 == value]
    assert right_before and found["near_never_shown_n"] == len(right_before)
    assert found["near_never_shown"] == 0 and found["near_shown"] == 1
    assert found["saebench_score"] == 1 and found["score"] == 0
    assert "nothing is left of a group" in found["reason_of_zero"]


def test_only_what_was_right_before_counts(analyse, planted) -> None:
    unknown = "forget1"
    known = [entity for entity in planted.entities if entity != unknown]
    found = row(analyse(subject=planted.subject(known=known), methods=["attribution"]), "attribution", "error_kept")
    assert found["forget_n"] == planted.each - 1 and found["candidates"] == planted.each - 1


def test_a_result_begins_with_what_was_found(analyse) -> None:
    result = analyse()
    first = result.notes[0]
    assert (
        first.startswith("With the reconstruction spliced in, ") and "leaves 0.00 of what was to be forgotten" in first
    )
    assert set(result.headline) <= set(result.scalars)
    assert all(f"score_{m}_{p}" in result.scalars for m in ("sparsity", "greedy") for p in ("spliced", "error_kept"))
    assert json.dumps(result.to_json())
    for figure in result.figures.values():
        plotly.graph_objects.Figure(figure)  # refuses what plotly does not know
    assert sum(r["chosen"] for r in result.tables["settings"]) == len(result.tables["methods"])


class Overwritten:
    """A method that changes the model itself: it no longer reads the first `n` entities. Without latents and without a path."""

    name = "overwritten"

    def prepare(self, seen: Seen) -> Prepared:
        def logits(passages, n: int):
            kept = passages.recording.activation.clone()
            kept[..., :n] = 0
            return seen.site.logits(passages, lambda _: kept)

        return Prepared(None, [Trial(f"{n} entities", None, partial(logits, n=n)) for n in (0, 3, 6, 9)])


def test_a_method_without_latents_is_measured_alike(analyse, monkeypatch) -> None:
    monkeypatch.setattr(Unlearn, "_methods", lambda self: [Overwritten()])
    result = analyse()
    found = row(result, "overwritten", "model")
    assert found["setting"] == "6 entities" and found["score"] == 1 and found["candidates"] is None
    assert "controls" not in found and found["kl_held_out"] > 0
    assert result.notes[0].startswith("Without the SAE, overwritten (6 entities) leaves 0.00")
    assert sum(note.startswith("Without the SAE") for note in result.notes) == 1


def test_settings_are_chosen_without_the_unseen_wordings(analyse) -> None:
    """Other questions in unseen wordings change no table of settings."""

    def other(table):
        for question in table["questions"]:
            if question["wording"] == "unseen" and question["entity"] == "near1":
                question["answer"] = 0

    assert analyse().tables["settings"] == analyse(other).tables["settings"]


def test_damage_is_kl_and_the_rise_of_the_cross_entropy(planted) -> None:
    seen = planted.seen()
    texts = {"some": seen.passages([*seen.forget, *seen.retain])}
    trial = seen.trial("clamped", [0, 1], Clamp(1.0), "error_kept")
    found = damage(seen.site, texts, trial.logits)["some"]
    kl, rise = [], []
    for passages in texts["some"]:
        before, after = (of(passages).detach().softmax(-1) for of in (seen.site.logits, trial.logits))
        for n, tokens in enumerate(passages.tokens.tolist()):
            for t in range(len(tokens) - 1):
                kl.append(float((before[n, t] * (before[n, t] / after[n, t]).log()).sum()))
                rise.append(float((before[n, t, tokens[t + 1]] / after[n, t, tokens[t + 1]]).log()))
    assert found.tokens == len(kl)
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-5) and found.kl > 0
    assert found.ce_rise == pytest.approx(sum(rise) / len(rise), rel=1e-5)
    assert damage(seen.site, texts, seen.site.logits)["some"].kl == 0


# --- bad input ----------------------------------------------------------------------------------------------------------


def without(group: str, kind: str):
    def change(table):
        table[kind] = [one for one in table[kind] if one["group"] != group]

    return change


def only(group: str):
    def change(table):
        for kind in ("texts", "questions"):
            table[kind] = [one for one in table[kind] if one["group"] == group]

    return change


def overlap(table):
    table["questions"][-1]["entity"] = "forget0"


def no_answer(table):
    table["questions"][0]["answer"] = 4


def outside(table):
    table["texts"][0]["name"] = [3, 99]


def wrong_type(table):
    table["texts"][0]["group"] = 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("forget", "texts"), "there is no text of the group 'forget'"),
        (only("forget"), "every text is of the group 'forget'"),
        (without("forget", "questions"), "no question in seen wording about anything to be forgotten"),
        (overlap, "'forget0' is both to be forgotten and to stay"),
        (no_answer, r"questions\.jsonl, line 1: answer: 4 is none of the 4 candidates"),
        (outside, r"texts\.jsonl, line 1: name: \[3, 99\] is not a stretch of the"),
        (wrong_type, r"texts\.jsonl, line 1: group: "),
    ],
)
def test_bad_data_are_refused(analyse, change, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        analyse(change)


def test_bad_data_are_refused_before_training(planted, tmp_path) -> None:
    with pytest.raises(OptionError, match="there is no such directory"):
        Unlearn(data=str(tmp_path / "none")).prepare(planted.context())


def test_a_model_at_chance_is_refused(analyse, planted) -> None:
    known = planted.entities[planted.each :]
    with pytest.raises(ComponentError, match=r"answers 0 of 12 questions in seen wording .* guessing gives 0\.25"):
        analyse(subject=planted.subject(known=known))


def test_a_model_that_knows_nothing_else_is_refused(analyse, planted) -> None:
    with pytest.raises(ComponentError, match="about what is to stay right"):
        analyse(subject=planted.subject(known=planted.entities[: planted.each]))


def test_no_candidates_are_a_zero_with_its_reason(analyse, planted) -> None:
    """Every latent of a fact to be forgotten also fires on retain text."""
    subject = planted.subject()
    with torch.no_grad():
        for word in range(3, 3 + len(planted.entities)):
            subject.model.embed.weight[word, : planted.each] += 0.1
    result = analyse(subject=subject, methods=["sparsity"])
    for path in ("spliced", "error_kept"):
        found = row(result, "sparsity", path)
        assert found["candidates"] == 0 and "No latent was a candidate" in found["reason_of_zero"]
    assert result.notes[0] == "With the reconstruction spliced in, nothing was unlearned: there was nothing to try."


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "/nowhere/facts"}, "there is no such directory"),
        ({"shown_groups": ["neer"]}, "no group 'neer' to stay. There are: far, near"),
        ({"shown_share": 0.01}, "is none of them"),
        ({"ablate": False, "clamps": [], "rms_clamps": []}, "nothing would be edited"),
    ],
)
def test_bad_options_are_refused(planted, tmp_path, options: dict, words: str) -> None:
    write(TypeAdapter(UnlearningData).dump_python(planted.data(), mode="json"), tmp_path)
    with pytest.raises(OptionError, match=words):
        Unlearn(**{"data": str(tmp_path), **options})(planted.context())
