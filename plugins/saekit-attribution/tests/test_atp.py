"""The analyzer `atp` on a tiny random language model, with labelled data that have every possible fault."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_attribution.atp.analyzer import AttributionPatching
from saekit_attribution.atp.sample_analysis import AnalysedSample
from saekit_attribution.atp.summary import summarise
from saekit_attribution.effects import attribute as attribute_module
from saekit_attribution.effects.attribute import attribute
from saekit_attribution.effects.methods import Attribution
from saekit_attribution.labelled_data.teacher_forcing import Sample, teacher_forced

from saekit import Result, RunContext, UsageError
from saekit.plugins import Registry
from saekit.testing import check
from saekit.testing.tiny import finished_run


def question(number: int, *variations: tuple[str, str, str, int]) -> dict[str, Any]:
    keys = ("template_type", "prompt", "response", "sycophancy_flag")
    return {"question_id": number, "variations": [dict(zip(keys, v, strict=True)) for v in variations], "note": "kept"}


def document() -> dict[str, Any]:
    """Eight good samples of two kinds and several lengths, among others that cannot be used."""
    results = []
    for n, word in enumerate(("lamp", "sea", "rope", "glass")):
        results.append(
            question(
                n,
                ("base", f"{word}?", "It is.", 0),
                ("like", f"+ {word}?", "Good.", 1),
                ("dislike", f"- {word}?", "It fails.", 1),
                ("like", f"+ {word}!", "It is.", 0),
            )
        )
    results += [
        question(4, ("like", "+ ink?", "Good.", 1)),
        question(5, ("base", "a?", "Hm", 0), ("base", "a?", "Oh", 0), ("like", "+ a?", "Good.", 1)),
        question(6, ("base", "b?", "Hm", 0), ("like", "+ b?", "Hm", 1), ("dislike", "- b?", "", 1)),
        question(7, ("base", "c?", "Hm", 0), ("like", "+ c?" * 10, "Good.", 1)),
        question(8, ("base", "d?", "Hm", 0), ("like", "d?", "Good.", 1)),
    ]
    return {"metadata": {"model": "tiny"}, "results": results, "unknown": [1, {"of": None}]}


GOOD = [(r, i) for r in range(4) for i in (1, 2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "labelled.json"
    path.write_text(json.dumps(document()), encoding="utf-8")
    return str(path)


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    context = finished_run(("subject_model", "tokens"), Registry()).context
    return dataclasses.replace(context, directory=tmp_path, warn=lambda message: None)


def written(context: RunContext, result: Result) -> dict[str, Any]:
    (name,) = result.files
    return json.loads((context.directory / name).read_text(encoding="utf-8"))


def entries(document: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    return {
        (r, i): variation["atp_analysis"]
        for r, result in enumerate(document["results"])
        for i, variation in enumerate(result["variations"])
        if "atp_analysis" in variation
    }


def samples_of(context: RunContext, data: str) -> dict[tuple[int, int], Sample]:
    from saekit_attribution.labelled_data.document import LabelledData, Pair

    pairs = [p for p in LabelledData.load(data).pairs() if isinstance(p, Pair)]
    subject = context.source.subject
    found = [teacher_forced(p, subject.tokenizer, subject.context) for p in pairs]
    return {s.place: s for s in found if isinstance(s, Sample)}


def test_conformance_on_labelled_data(data: str) -> None:
    report = check("analyzer", "atp", options={"data": data, "methods": ["atp", "ig", "exact"], "save_interval": 3})
    assert all(outcome.status == "passed" for outcome in report.outcomes), report


def test_what_is_written_is_the_document_with_the_analyses(context: RunContext, data: str) -> None:
    result = AttributionPatching(data=data, save_interval=3)(context)
    after = written(context, result)
    assert result.files[0].startswith("atp_results_model_20")
    bare = copy.deepcopy(after)
    for r, i in entries(after):
        assert list(bare["results"][r]["variations"][i])[-1] == "atp_analysis"
        del bare["results"][r]["variations"][i]["atp_analysis"]
    assert json.dumps(bare) == json.dumps(document())
    left = {path.name for path in context.directory.iterdir()}
    assert left == {*result.files, "atp_analysis.json"}  # no intermediate save is left behind


def test_each_entry_says_what_the_methods_say_of_the_sample_alone(context: RunContext, data: str) -> None:
    result = AttributionPatching(data=data, methods=["atp", "ig", "exact"], top_k=5, save_interval=3)(context)
    found = entries(written(context, result))
    subject, samples = context.source.subject, samples_of(context, data)
    for place in GOOD:
        sample, entry = samples[place], found[place]
        (alone,) = attribute(subject, context.sae, [sample], methods=("atp", "ig", "exact"))
        assert isinstance(alone, dict)
        # The tokens are bytes, the first one the space that joins: " Good." and " It fails." beside " It is."
        told = (entry["target_token"], entry["base_token"], entry["token_position"])
        assert told == (("G", "I", 2) if place[1] == 1 else ("f", "i", 5))
        with torch.no_grad():
            logits = subject.model(torch.tensor([sample.tokens])).logits[0, -1]
        assert entry["logit_diff"] == pytest.approx(float(logits[sample.target] - logits[sample.base]), abs=1e-5)
        for method, of_method in {"atp": entry, **entry["methods"]}.items():
            attribution = alone[method]
            assert len(of_method["top_features"]) == min(5, len(attribution.latents))
            best = attribution.scores.abs().sort(descending=True).values[:5]
            shown = [abs(feature["score"]) for feature in of_method["top_features"]]
            assert shown == pytest.approx(best.tolist(), abs=1e-5)
            by_latent = dict(zip(attribution.latents.tolist(), attribution.scores.tolist(), strict=True))
            for feature in of_method["top_features"]:
                assert isinstance(feature["id"], str)
                assert feature["score"] == pytest.approx(by_latent[int(feature["id"])], abs=1e-5)
                if method == "exact":
                    assert feature["gradient"] is None
                else:
                    assert feature["score"] == pytest.approx(feature["activation"] * feature["gradient"], abs=1e-5)
            assert of_method["error_node"] == pytest.approx(attribution.error, abs=1e-5)
        assert -1 <= entry["fidelity"]["spearman"] <= 1
        assert entry["methods"]["exact"]["fidelity"]["spearman"] is None


def test_what_cannot_be_used_is_skipped_in_place_and_counted(context: RunContext, data: str) -> None:
    result = AttributionPatching(data=data)(context)
    found = entries(written(context, result))
    reasons = {place: entry["skipped"] for place, entry in found.items() if "skipped" in entry}
    assert reasons == {
        (4, 0): "No base variation",
        (5, 2): "Several base variations",
        (6, 1): "The response equals the base response",
        (6, 2): "Empty response",
        (7, 1): "Longer than the model's context: more than 32 tokens before the responses differ",
    }
    assert {row["reason"]: row["samples"] for row in result.tables["skipped"]} == Counter(reasons.values())
    assert result.scalars["samples"] == 14
    assert (result.scalars["analysed"], result.scalars["skipped"], result.scalars["failed"]) == (9, 5, 0)
    assert not {(0, 0), (0, 3)} & found.keys()  # not flagged


def test_against_the_base_run_equal_prompts_are_skipped(context: RunContext, data: str) -> None:
    result = AttributionPatching(data=data, reference="base", positions="all")(context)
    found = entries(written(context, result))
    assert "zero by causality" in found[8, 1]["skipped"]
    assert all("top_features" in found[place] for place in GOOD)


def test_one_bad_sample_does_not_stop_the_rest(context: RunContext, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = entries(written(context, AttributionPatching(data=data)(context)))
    batch = attribute_module.batch_attributions

    def fails(subject: Any, sae: Any, samples: list[Sample], *args: Any) -> Any:
        if any(sample.place == (2, 1) for sample in samples):
            raise ArithmeticError("the lamp went out")
        return batch(subject, sae, samples, *args)

    monkeypatch.setattr(attribute_module, "batch_attributions", fails)
    context = dataclasses.replace(context, directory=context.directory / "again")
    context.directory.mkdir()
    result = AttributionPatching(data=data)(context)
    found = entries(written(context, result))
    assert found.pop((2, 1)) == {"error": "ArithmeticError", "details": {"message": "the lamp went out"}}
    assert found.keys() == good.keys() - {(2, 1)}
    assert all(found[p]["logit_diff"] == pytest.approx(good[p]["logit_diff"], abs=1e-5) for p in GOOD if p != (2, 1))
    assert result.scalars["failed"] == 1
    assert result.tables["failed"] == [{"error": "ArithmeticError", "samples": 1}]
    assert any(note.startswith("1 of 14 samples failed") for note in result.notes)


def test_scores_that_are_not_finite_are_an_error_of_their_sample(context: RunContext, data: str) -> None:
    sae = copy.deepcopy(context.sae)
    with torch.no_grad():
        sae.W_dec.fill_(float("nan"))
    result = AttributionPatching(data=data)(dataclasses.replace(context, sae=sae))
    found = entries(written(context, result))
    assert {found[place]["error"] for place in GOOD} == {"NotFinite"}
    assert result.scalars["analysed"] == 0


def test_the_ranking_is_the_mean_over_the_samples_with_its_spread(context: RunContext, data: str) -> None:
    result = AttributionPatching(data=data, top_k=1000)(context)
    found = [e for e in entries(written(context, result)).values() if "top_features" in e]
    scores: dict[int, list[float]] = {}
    for entry in found:
        for feature in entry["top_features"]:
            scores.setdefault(int(feature["id"]), []).append(feature["score"])
    ranking = {row["latent"]: row for row in result.tables["ranking"]}
    assert ranking.keys() == scores.keys()
    for latent, values in scores.items():
        full = torch.tensor(values + [0.0] * (len(found) - len(values)), dtype=torch.float64)
        assert ranking[latent]["score"] == pytest.approx(float(full.mean()), abs=1e-9)
        assert ranking[latent]["spread"] == pytest.approx(float(full.std(correction=0)), abs=1e-6)
        assert ranking[latent]["samples"] == len(values)
    sizes = [abs(row["score"]) for row in result.tables["ranking"]]
    assert sizes == sorted(sizes, reverse=True)
    kinds = {row["template_type"] for row in result.tables["ranking_by_template_type"]}
    assert kinds == {"like", "dislike"}


def test_the_top_latents_come_with_examples_that_hold_their_token(context: RunContext, data: str) -> None:
    result = AttributionPatching(data=data)(context)
    examples = result.tables["examples"]
    assert {row["latent"] for row in examples} <= {row["latent"] for row in result.tables["ranking"]}
    assert examples
    for row in examples:
        example = row["example"]
        assert example["kind"] == "tokens"
        assert row["activation"] == pytest.approx(example["activations"][example["at"]], abs=1e-3)


def test_sets_are_tested_for_each_template_type(context: RunContext, data: str) -> None:
    result = AttributionPatching(data=data, set_sizes=[2, 4], draws=3)(context)
    rows = result.tables["sets"]
    assert [(row["template_type"], row["latents"]) for row in rows] == [
        (kind, size) for kind in ("like", "dislike") for size in (2, 4)
    ]
    for row in rows:
        assert row["samples"] == row["questions"] == (5 if row["template_type"] == "like" else 4)
        for name in ("necessity", "sufficiency", "put_in"):
            assert row.keys() >= {name, f"{name}_low", f"{name}_high", f"{name}_random", f"{name}_random_most"}
    assert any("matched random latents" in note for note in result.notes)
    assert AttributionPatching(data=data, set_sizes=[])(context).tables.keys().isdisjoint({"sets"})


def test_positions_are_written_by_option_only_and_only_those_with_a_score(context: RunContext, data: str) -> None:
    options: dict[str, Any] = {"data": data, "positions": "all", "methods": ["exact", "atp"], "set_sizes": []}
    plain = entries(written(context, AttributionPatching(**options)(context)))
    found = entries(written(context, AttributionPatching(**options, per_position=2, save_interval=3)(context)))
    tokens = samples_of(context, data)
    for place in GOOD:
        assert "positions" not in plain[place]["methods"]["atp"]
        assert "positions" not in found[place], "an exact effect is of all positions at once"
        rows = found[place]["methods"]["atp"]["positions"]
        strings = context.source.token_strings(torch.tensor(tokens[place].tokens))
        assert [row["token"] for row in rows] == [strings[row["position"]] for row in rows]
        assert len({row["position"] for row in rows}) == len(rows) > 1
        assert all(len(row["top_features"]) <= 2 for row in rows)
        assert all(feature["score"] for row in rows for feature in row["top_features"])


def test_positions_of_exact_effects_alone_are_refused() -> None:
    with pytest.raises(UsageError, match="per_position: an exact effect is of all positions at once"):
        AttributionPatching(methods=["exact"], per_position=3)


def test_data_without_a_flagged_variation_gives_a_note(context: RunContext, tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    path.write_text(json.dumps({"results": [question(0, ("base", "a?", "Hm", 0))]}), encoding="utf-8")
    result = AttributionPatching(data=str(path))(context)
    assert result.scalars["samples"] == 0
    assert result.notes == ["Nothing was attributed: no variation is flagged."]


def test_a_missing_file_is_told_of_before_anything_runs() -> None:
    component = Registry().find("analyzer", "atp")
    with pytest.raises(UsageError, match=r"analyzer\.atp\.data: .*there is no such file.*nowhere\.json"):
        component.validate({"data": "nowhere.json"}, "analyzer.atp")


# --- what the summary warns of ----------------------------------------------------------------------------------


def analysed(scores: list[float], exact: list[float], error: float = 0.0, moved: float | None = None) -> AnalysedSample:
    def one(values: list[float]) -> Attribution:
        tensor = torch.tensor(values, dtype=torch.float64)
        total = sum(exact) + error if moved is None else moved
        ones = torch.ones_like(tensor)
        return Attribution(torch.arange(len(values)), tensor, ones, tensor, ones, error, 1.0, total)

    sample = Sample((1, 2), 3, 4, (1, 2), (0, 1), template_type="like")
    return AnalysedSample(sample, {"atp": one(scores), "exact": one(exact)})


def notes(*found: AnalysedSample) -> list[str]:
    return summarise(found, Counter(), Counter(), top_k=5, recall_at=10).notes


def test_a_faithful_estimate_gives_no_warning() -> None:
    assert notes(analysed([1.0, 2.0, 3.0], [1.1, 2.0, 2.9])) == []


def test_low_fidelity_is_warned_of() -> None:
    (note,) = notes(analysed([3.0, 1.0, 2.0], [1.0, 2.0, 3.0]))
    assert "Fidelity is low" in note
    assert "-0.50" in note


def test_an_estimate_that_misses_the_first_latents_is_warned_of() -> None:
    """Spearman's correlation is high, since most latents have next to no effect."""
    exact = [1.0 - 0.001 * n for n in range(5)] + [0.001 * n for n in range(95)]
    estimate = [0.094 - 0.001 * n for n in range(5)] + [0.001 * n for n in range(90)] + [1.0 + 0.001 * n for n in range(5)]
    found = analysed(estimate, exact)
    assert found.fidelity("atp", 5).spearman > 0.8
    result = summarise([found], Counter(), Counter(), top_k=5, recall_at=5)
    assert (result.scalars["atp_recall_at_5"], result.scalars["atp_recall_at_5_by_chance"]) == (0.0, 0.05)
    assert any("Of the 5 latents with the largest exact effects, atp has 0%" in note for note in result.notes)


def test_scores_that_do_not_add_up_are_warned_of() -> None:
    found = notes(analysed([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], moved=9.0))
    assert len(found) == 2  # the estimate's, and the exact single effects too
    assert all("add up to 0.60 logits, but all nodes together carry 9.00" in note for note in found)


def test_an_error_that_carries_the_effect_is_warned_of() -> None:
    (note,) = notes(analysed([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], error=14.0))
    assert "70% of what all nodes carry together, 70% of the sum" in note


def test_without_exact_effects_the_fidelity_is_said_to_be_unknown() -> None:
    found = analysed([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    (note,) = notes(AnalysedSample(found.sample, {"atp": found.attributions["atp"]}))
    assert "unknown how far" in note
