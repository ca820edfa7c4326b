"""`ablate`: joint selection, what is measured, and the whole analyzer on tiny models."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from saekit_attribution.ablate.analyzer import Ablate
from saekit_attribution.ablate.answers import Preference, answers, drawn_answers, preferences
from saekit_attribution.ablate.greedy_selection import PromptPair, _Texts, greedy_selection
from saekit_attribution.ablate.judge import commonest, judged, load_judge, share_of
from saekit_attribution.ablate.measures import BehaviourMeasurement
from saekit_attribution.ablate.questions import split, template_types
from saekit_attribution.ablate.side_effects import side_effects, source_text
from saekit_attribution.labelled_data.document import LabelledData

import saekit
from saekit import Result, RunContext, TokenBatch, TrainedPositions, UsageError
from saekit.activations.huggingface import load_subject
from saekit.activations.subject import Subject
from saekit.plugins import Registry
from saekit.runner.compose import Request, compose
from saekit.runner.plan import plan_run
from saekit.testing import check
from saekit.testing.tiny import finished_run, save_tiny_gemma2

ROOT = Path(__file__).parents[3]
GEMMA = ROOT / "docs" / "examples" / "attribution" / "gemma-2-9b-it.toml"


# --- joint selection -----------------------------------------------------------------------------------------------


def questions(tiny, lengths: list[int]) -> list[PromptPair]:
    samples = tiny.samples(lengths)
    return [PromptPair(s.tokens, s.base_tokens, (s.base, s.target, 7)) for s in samples]


def texts(subject: Subject, sae: saekit.SparseAutoencoder, asked: list[PromptPair]) -> _Texts:
    return _Texts(subject, sae, [(q.prompt, q.answer) for q in asked])


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


def test_latents_are_ablated_counted_and_compared_where_the_sae_was_trained(
    tiny, gpt2: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, samples = tiny.sae(gpt2), tiny.samples([20, 20])
    rows = [sample.tokens for sample in samples]
    sae.trained_positions = TrainedPositions(True, (rows[0][7],))
    trained = sae.trained_positions.in_rows(torch.tensor(rows))  # [2, 20]
    assert trained[0, 0] and not trained[0, 7]
    source = SimpleNamespace(subject=gpt2, token_batches=lambda *_, **__: iter([TokenBatch.of_rows(rows)]))
    context: Any = SimpleNamespace(source=source, sae=sae)
    some = SimpleNamespace(samples=samples, tokens=rows, base_tokens=rows, too_long=0)
    sets: Any = SimpleNamespace(template_type="like", ranking=some, curve=some, test=some)
    measured = BehaviourMeasurement(context, None, Ablate(data="none.json"), sets)
    before, edit = gpt2.activations(TokenBatch.of_rows(rows)), measured.edit(range(sae.d_sae))
    assert edit is not None
    with edit, saekit.read(gpt2.model, sae, gpt2.site, after=edit) as reader:
        gpt2.model(torch.tensor(rows))
    code = sae.encode(before.flatten(0, 1)).dense()
    changed = (reader.code.dense() - code).abs().amax(1) > 1e-3
    assert torch.equal(changed, trained.flatten() & (code != 0).any(1))
    torch.testing.assert_close(measured.activity(rows).density, (code[trained.flatten()] != 0).float().mean(0))
    (batch,) = texts(gpt2, sae, [PromptPair(row[:-3], row[:-3], row[-3:]) for row in rows])._batches
    assert set(zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)) <= set(map(tuple, trained.nonzero().tolist()))
    assert 0 in batch.positions
    (compared,) = source_text(context, 10)["held_out"]
    assert torch.equal(compared.keep, trained)


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
    base = _Texts(gpt2, sae, [(q.base_prompt, q.answer) for q in asked])
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
    flagged, base = texts(gpt2, sae, asked), _Texts(gpt2, sae, [(q.base_prompt, q.answer) for q in asked])
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


RUN_FILE = """
[source]
use = "organism"
[architecture]
use = "topk"
d_sae = 8
k = 2
[[loss]]
use = "mse"
[[analyzer]]
use = "ablate"
judge = "{judge}"
"""


@pytest.mark.parametrize("place", [".", "judges"])
def test_a_judge_beside_the_run_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "mine.py").write_text("def classify(prompt, response, kind):\n    return kind", encoding="utf-8")
    path = tmp_path / "run.toml"
    path.write_text(RUN_FILE.format(judge=f"{place}/mine.py:classify"), encoding="utf-8")
    config, registry = compose(Request(str(path)))
    (part,) = plan_run(config, registry).members[0].sections["analyzer"]
    assert part.build().judge_function("p", "r", "like") == "like"
    assert part.options["judge"] == f"{(tmp_path / place / 'mine.py').resolve()}:classify", "so that a resumed run finds it"


def test_a_judge_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module_at_all", encoding="utf-8")
    for name, message in {
        f"{broken}:f": "cannot be imported: ModuleNotFoundError",
        f"{tmp_path}/absent.py:f": "there is no such file. In a run file its path is relative to that file",
        "absent_module:f": "or write FILE.py:function",
    }.items():
        with pytest.raises(UsageError, match=message):
            load_judge(name)


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
    found = preferences(gpt2, samples)
    assert [one.margin for one in found] == pytest.approx(margins, abs=1e-5)
    assert [one.likeliest for one in found] == [int(x.argmax()) for x in logits]


# --- the analyzer ------------------------------------------------------------------------------------------------


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def labelled(subject: Subject, n: int = 12) -> dict[str, Any]:
    """Questions whose flagged answers begin with a letter that is likelier than that of the base answers after "+" alone."""
    results = []
    letters = subject.tokenizer.convert_tokens_to_ids(list(LETTERS))
    for number in range(n):
        prompts = {"base": f"{LETTERS[number % 26]}{number}?", "like": f"+{LETTERS[number % 26]}{number}?"}
        logits = {}
        for kind, prompt in prompts.items():
            tokens = [0, *subject.tokenizer(prompt + " ", add_special_tokens=False)["input_ids"]]
            logits[kind] = subject.model(torch.tensor([tokens])).logits[0, -1].detach()[letters]
        like, base = logits["like"], logits["base"]
        both = torch.minimum(like[:, None] - like, base - base[:, None])  # [target, base], the smaller of two margins
        told, plain = (LETTERS[int(i)] for i in divmod(int(both.argmax()), len(LETTERS)))
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


# --- memory ---------------------------------------------------------------------------------------------------------


def short_of_memory(monkeypatch: pytest.MonkeyPatch, subject: Subject, rows: int) -> list[int]:
    """The model runs out of memory with more than `rows` rows. The list gets the rows of each attempt."""
    attempts: list[int] = []
    logits = subject.logits

    def limited(batch: TokenBatch) -> torch.Tensor:
        attempts.append(len(batch.tokens))
        if len(batch.tokens) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return logits(batch)

    monkeypatch.setattr(subject, "logits", limited)
    return attempts


def test_preferences_keep_to_the_memory_there_is(tiny, gpt2: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = tiny.samples([9, 12, 9, 9, 9, 9])
    whole = preferences(gpt2, samples)
    attempts = short_of_memory(monkeypatch, gpt2, 2)
    assert_close(preferences(gpt2, samples), whole)
    assert attempts == [5, 2, 3, 1, 2, 1], "a batch that does not fit is halved"
    attempts.clear()
    assert_close(preferences(gpt2, samples, batch_tokens=18), whole)
    assert attempts == [2, 2, 1, 1], "batch_tokens says how many go through the model at a time"


def assert_close(found: list[Preference], expected: list[Preference]) -> None:
    assert [one.likeliest for one in found] == [one.likeliest for one in expected]
    assert [one.margin for one in found] == pytest.approx([one.margin for one in expected])


def test_side_effects_keep_to_the_memory_there_is(tiny, gpt2: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randint(2, 120, (5, 12), generator=torch.Generator().manual_seed(3)).tolist()
    batch = TokenBatch.of_rows([row[: 12 - i] for i, row in enumerate(rows)], TrainedPositions(False))
    edit = saekit.attach(gpt2.model, tiny.sae(gpt2), gpt2.site, edits={j: saekit.ablate() for j in range(0, 20)})
    logits = gpt2.logits(batch)
    with edit:
        edited = gpt2.logits(batch)
    scored = batch.keep[:, :-1] & batch.mask[:, 1:]
    clean, other = (x[:, :-1][scored].detach().log_softmax(-1) for x in (logits, edited))
    attempts = short_of_memory(monkeypatch, gpt2, 2)
    for size, expected in {8192: [5, 2, 2, 3, 1, 1, 2, 2], 24: [2, 2, 2, 2, 1, 1]}.items():
        attempts.clear()
        found = side_effects(gpt2, edit, [batch], batch_tokens=size)
        assert attempts == expected
        assert found.tokens == int(scored.sum())
        assert found.kl == pytest.approx(float((clean.exp() * (clean - other)).sum(1).mean()), rel=1e-5)
        assert found.ce_before == pytest.approx(float(-clean.gather(1, batch.tokens[:, 1:][scored][:, None]).mean()), rel=1e-5)
