"""`ablate`: joint selection, what is measured, and the whole analyzer on tiny models."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from saekit_attribution.ablate.analyzer import Ablate
from saekit_attribution.ablate.answers import answers, drawn_answers, preferences
from saekit_attribution.ablate.greedy_selection import PromptPair, _Texts, greedy_selection
from saekit_attribution.ablate.judge import commonest, judged, load_judge, share_of
from saekit_attribution.ablate.questions import split, template_types
from saekit_attribution.labelled_data.document import LabelledData

import saekit
from saekit import Result, RunContext, UsageError
from saekit.activations.huggingface import load_subject
from saekit.activations.subject import Subject
from saekit.plugins import Registry
from saekit.testing import check
from saekit.testing.tiny import finished_run, save_tiny_gemma2

ROOT = Path(__file__).parents[3]
GEMMA = ROOT / "docs" / "examples" / "attribution" / "gemma-2-9b-it.toml"


# --- joint selection -----------------------------------------------------------------------------------------------


def questions(tiny, lengths: list[int]) -> list[PromptPair]:
    samples = tiny.samples(lengths)
    return [PromptPair(s.tokens, s.base_tokens, (s.base, s.target, 7)) for s in samples]


def texts(subject: Subject, sae: saekit.SparseAutoencoder, asked: list[PromptPair]) -> _Texts:
    return _Texts(subject, sae, [(q.prompt, q.answer) for q in asked], True)


def test_the_loss_of_a_set_is_that_of_the_edited_model(tiny, gpt2: Subject) -> None:
    sae, asked = tiny.sae(gpt2), questions(tiny, [9, 12, 9])
    latents = list(range(0, sae.d_sae, 3))
    losses = texts(gpt2, sae, asked).losses(latents)
    edits = {j: saekit.ablate() for j in latents}
    for q, loss in zip(asked, losses.tolist(), strict=True):
        with torch.no_grad(), saekit.attach(gpt2.model, sae, gpt2.site, edits=edits, positions=slice(1, None)):
            logits = gpt2.model(torch.tensor([[*q.prompt, *q.answer]])).logits[0, -4:-1]
        there = -logits.float().log_softmax(-1).gather(1, torch.tensor(q.answer)[:, None]).sum()
        assert loss == pytest.approx(float(there), abs=1e-4)


def test_the_estimate_is_the_slope_of_the_loss(tiny, gpt2: Subject) -> None:
    """Scaling one latent by 1 - h changes the loss by h times the estimate, for a small h."""
    sae, asked = tiny.sae(gpt2), questions(tiny, [9, 9])
    found = texts(gpt2, sae, asked)
    estimate, h = found.estimate([], torch.full((2,), -1e9, dtype=torch.float64)), 1e-3
    for latent in estimate.abs().argsort(descending=True)[:4].tolist():
        change = 0.0
        for q in asked:
            values = []
            for factor in (1.0, 1 - h):
                edit = saekit.attach(
                    gpt2.model, sae, gpt2.site, edits={latent: saekit.scale(factor)}, positions=slice(1, None)
                )
                with torch.no_grad(), edit:
                    logits = gpt2.model(torch.tensor([[*q.prompt, *q.answer]])).logits[0, -4:-1].detach()
                values.append(-logits.log_softmax(-1).gather(1, torch.tensor(q.answer)[:, None]).sum())
            change += float(values[1] - values[0]) / h / 2
        assert change == pytest.approx(float(estimate[latent]), rel=0.02)


def test_each_latent_taken_lowers_what_is_left(tiny, gpt2: Subject) -> None:
    sae, asked = tiny.sae(gpt2), questions(tiny, [9, 12, 9])
    taken = greedy_selection(gpt2, sae, asked, 6)
    assert len(set(taken)) == len(taken) >= 2
    flagged = texts(gpt2, sae, asked)
    base = _Texts(gpt2, sae, [(q.base_prompt, q.answer) for q in asked], True)
    undisturbed = base.losses([])
    costs = [
        sum(float((t.losses(taken[:n]) - undisturbed).clamp_min(0).mean()) for t in (flagged, base))
        for n in range(len(taken) + 1)
    ]
    assert costs == sorted(costs, reverse=True)
    assert greedy_selection(gpt2, sae, asked, 6) == taken


def test_two_latents_that_stand_in_for_each_other_are_found_together(tiny, gpt2: Subject) -> None:
    """With the first one ablated the second one matters, whatever its effect alone."""
    sae, asked = tiny.sae(gpt2), questions(tiny, [9, 12])
    first, second = greedy_selection(gpt2, sae, asked, 2, shortlist=sae.d_sae)
    flagged, base = texts(gpt2, sae, asked), _Texts(gpt2, sae, [(q.base_prompt, q.answer) for q in asked], True)
    undisturbed = base.losses([])

    def cost(latents: list[int]) -> float:
        return sum(float((t.losses(latents) - undisturbed).clamp_min(0).mean()) for t in (flagged, base))

    assert cost([first]) == pytest.approx(min(cost([j]) for j in range(sae.d_sae)))
    others = [j for j in range(sae.d_sae) if j != first]
    assert cost([first, second]) == pytest.approx(min(cost([first, j]) for j in others), abs=0.02)


def test_selection_needs_questions(tiny, gpt2: Subject) -> None:
    with pytest.raises(UsageError, match="no questions"):
        greedy_selection(gpt2, tiny.sae(gpt2), [], 3)


# --- answers and judges --------------------------------------------------------------------------------------------


def test_a_judge_is_named_by_module_and_function(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("judges_of_the_test")
    module.classify = lambda prompt, response, kind: "long" if len(response) > 3 else "short"  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "judges_of_the_test", module)
    judge = load_judge("judges_of_the_test:classify")
    found = judged(judge, ["a", "b", "c"], ["yes", "perhaps", "no"], "like")
    assert found == ["short", "long", "short"]
    assert (commonest(found), share_of(found, "long")) == ("short", pytest.approx(1 / 3))
    for name in ("judges_of_the_test", "judges_of_the_test:absent", "absent_module:f", "judges_of_the_test:number"):
        with pytest.raises(UsageError, match=r"^judge: "):
            load_judge(name)
    with pytest.raises(UsageError, match="name of a class"):
        judged(lambda *_: 1, ["a"], ["b"], "like")  # type: ignore[arg-type, return-value]


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    found = finished_run(("subject_model", "tokens"), Registry()).context
    return dataclasses.replace(found, directory=tmp_path)


def test_answers_are_the_models_own_whatever_stands_beside_them(context: RunContext) -> None:
    subject = context.source.subject
    prompts = [(0, 40, 41), (0, 50), (0, 60, 61), (0, 70, 80, 90)]
    together = answers(subject, prompts, max_new_tokens=5)
    for prompt, answer in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for _ in range(5):
            logits = subject.model(torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits.argmax()))
            if tokens[-1] == subject.tokenizer.eos_token_id:
                break
        assert answer == subject.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True).strip()


def test_drawn_answers_depend_on_the_seed_alone(context: RunContext) -> None:
    subject, prompts = context.source.subject, [(0, 40, 41), (0, 50), (0, 60, 61)]
    state = torch.random.get_rng_state()
    draws = [drawn_answers(subject, prompts, 6, seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert draws[0] == draws[1] != draws[2]
    assert all(len(answer) == 6 for answer in draws[0])


def test_preferences_are_read_off_the_logits(tiny, gpt2: Subject) -> None:
    samples = tiny.samples([9, 12, 9])
    logits = [tiny.last_logits(gpt2, s) for s in samples]
    margins = [float(x[s.target] - x[s.base]) for x, s in zip(logits, samples, strict=True)]
    mean, preferred, likeliest = preferences(gpt2, samples)
    assert mean == pytest.approx(sum(margins) / 3, abs=1e-5)
    assert preferred == pytest.approx(sum(m > 0 for m in margins) / 3)
    sure = [dataclasses.replace(s, base=int(x.argmax())) for x, s in zip(logits, samples, strict=True)]
    assert (likeliest, preferences(gpt2, sure)[2]) == (0, 1)


# --- the analyzer ------------------------------------------------------------------------------------------------


def labelled(subject: Subject, n: int = 12) -> dict[str, Any]:
    """Questions whose flagged answers begin with the model's likeliest letter and whose base answers with another one."""
    results = []
    for number in range(n):
        prompts = {"base": f"{chr(97 + number)}b?", "like": f"+{chr(97 + number)}b?"}
        tokens = [0, *subject.tokenizer(prompts["like"] + " ", add_special_tokens=False)["input_ids"]]
        logits = subject.model(torch.tensor([tokens])).logits[0, -1]
        letters = subject.tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
        best = max(letters, key=lambda token: float(logits[token]))
        worst = min(letters, key=lambda token: float(logits[token]))
        told, plain = (subject.tokenizer.convert_ids_to_tokens(token) for token in (best, worst))
        variations = [
            {"template_type": "base", "prompt": prompts["base"], "response": plain + "x", "sycophancy_flag": 0},
            {"template_type": "like", "prompt": prompts["like"], "response": told + "x", "sycophancy_flag": 1},
        ]
        results.append({"question_id": number, "variations": variations})
    return {"results": results}


@pytest.fixture
def data(context: RunContext, tmp_path: Path) -> str:
    path = tmp_path / "labelled.json"
    path.write_text(json.dumps(labelled(context.source.subject)), encoding="utf-8")
    return str(path)


SMALL: dict[str, Any] = {"numbers": [2, 4], "rank_samples": 4, "max_new_tokens": 3, "damage_tokens": 100, "draws": 2}


def test_a_file_without_a_judge_is_measured_by_the_two_tokens(context: RunContext, data: str) -> None:
    result = Ablate(data=data, **SMALL)(context)
    assert result.scalars["like_rate_before"] == 1.0
    assert {row["ranking"] for row in result.tables["curve"]} == {"atp", "atp_weighted", "ig", "exact", "greedy"}
    assert len(result.tables["controls"]) == 2
    chosen = [row["latent"] for row in result.tables["latents"]]
    assert len(chosen) == result.scalars["like_latents"] == len(set(chosen)) >= 1
    margins = {(row["ranking"], row["latents"]): row["margin"] for row in result.tables["curve"]}
    assert min(margins.values()) < result.scalars["like_margin_before"]
    by_exact = next(r for r in result.tables["agreement_with_exact"] if r["ranking"] == "exact")
    assert by_exact["spearman"] == pytest.approx(1.0) and by_exact["shared_with_first"] == 1.0
    assert result.scalars["like_kl"] > 0
    json.dumps(result.to_json())


def test_no_two_parts_share_a_question(context: RunContext) -> None:
    document = LabelledData(labelled(context.source.subject), "test")
    parts = split(document, 4, seed=0)
    assert [len(part) for part in parts] == [4, 4, 4]
    assert set.union(*parts) == set(range(12))
    assert [len(part) for part in split(document, 48, seed=0)] == [6, 3, 3]
    assert template_types(document) == ["like"]


@pytest.mark.parametrize("options", [{"mode": "base_mean"}, {"factor": -1.0}, {"keep_error": False}])
def test_other_edits(context: RunContext, data: str, options: dict[str, Any]) -> None:
    plain, other = (
        Ablate(data=data, rankings=["exact"], **SMALL, **more)(context).tables["curve"] for more in ({}, options)
    )
    assert [row["latents"] for row in plain] == [row["latents"] for row in other]
    assert [row["margin"] for row in plain] != [row["margin"] for row in other]


def test_a_judge_that_sees_no_difference_is_told(
    context: RunContext, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("blind_judge")
    module.classify = lambda *_: "fine"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "blind_judge", module)
    result = Ablate(data=data, judge="blind_judge:classify", **SMALL)(context)
    assert result.scalars == {} and "calls every answer 'fine'" in result.notes[0]


def test_nothing_flagged_is_a_null_result(context: RunContext, tmp_path: Path) -> None:
    document = labelled(context.source.subject)
    for question in document["results"]:
        question["variations"][1]["sycophancy_flag"] = 0
    path = tmp_path / "unflagged.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    result = Ablate(data=str(path), **SMALL)(context)
    assert isinstance(result, Result) and "no answer is flagged" in result.notes[0]


def test_conformance(data: str) -> None:
    report = check("analyzer", "ablate", options={"data": data, **SMALL})
    assert all(outcome.status == "passed" for outcome in report.outcomes), report


# --- a large model's setting ------------------------------------------------------------------------------------------


def small_jumprelu(place: Path) -> Path:
    """A random SAE in the layout of sae_lens, as a release's files are."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class

    assert sae_lens
    sae_class, config_class = get_sae_class("jumprelu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = sae_class(config_class(d_in=32, d_sae=64, apply_b_dec_to_input=False, dtype="float32"))
        for name, parameter in sae.named_parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape)
            if name == "threshold":
                parameter.data = parameter.data.abs()
    sae.cfg.metadata.hook_name = "blocks.1.hook_out"
    sae.save_model(place)
    return place


@pytest.mark.slow
def test_the_run_file_for_gemma_on_a_small_one(tmp_path: Path) -> None:
    model, sae = save_tiny_gemma2(tmp_path / "model"), small_jumprelu(tmp_path / "sae")
    (tmp_path / "unrelated.txt").write_text("\n\n".join(f"Line {n} of a harbour." for n in range(60)), encoding="utf-8")
    subject = load_subject(str(model), "blocks.1.hook_out")
    (tmp_path / "labelled.json").write_text(json.dumps(labelled(subject)), encoding="utf-8")
    overrides = {
        "source.model": str(model), "source.model_dtype": "float32", "source.hook_point": "blocks.1.hook_out",
        "source.data": str(tmp_path / "unrelated.txt"), "source.context": 32, "source.held_out": 0.3,
        "architecture.from": str(sae), "evaluation.tokens": 200, "training.device": "cpu",
        "analyzer.atp.data": str(tmp_path / "labelled.json"),
        "analyzer.ablate.data": str(tmp_path / "labelled.json"), "analyzer.ablate.numbers": [2, 4],
        "analyzer.ablate.rank_samples": 4, "analyzer.ablate.damage_tokens": 100,
    }  # fmt: skip
    done = saekit.run(GEMMA, overrides=overrides, directory=tmp_path / "run")
    analysis = done.directory / "analysis"
    found = {
        name: json.loads((analysis / name / "result.json").read_text(encoding="utf-8")) for name in ("atp", "ablate")
    }
    assert found["atp"]["scalars"]["analysed"] == 12
    assert found["ablate"]["scalars"]["like_rate_before"] == 1.0
    assert {row["latents"] for row in found["ablate"]["tables"]["curve"]} <= {1, 2, 3, 4}


def test_the_run_file_names_what_is_missing() -> None:
    with pytest.raises(UsageError, match=r"analyzer.atp.data: .*there is no such file"):
        saekit.run(GEMMA)
