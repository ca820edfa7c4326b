"""The whole analyzer on a tiny run: its files, its figures, its errors."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from saekit_steering.continuations import distinct, judged, load_judge, log_perplexity
from saekit_steering.prompts import DEFAULT, load_prompts
from saekit_steering.steer import Steer
from saekit_steering.steering_vectors import KINDS

from saekit import AgainstControls, RunContext, UsageError

SEED = {
    "model": str,
    "layer_idx": int,
    "sae": {"input_dim": int, "sae_dim": int, "fixed_v_cnt": int},
    "gnn": {"use_gnn": bool, "top_k": int},
    "steering": {"feature_idx": int, "strength": float},
    "prompt": str,
    "output": {"before": str, "after": str},
    "feature_stats": {"indices": list, "f_before": list, "f_after": list, "g_before": list, "g_after": list},
    "feature_std_summary": {"mean_std": float, "max_std": float},
}
"""The fields of a feature-steering log, `L12_S15.0.json`."""


def fields(document: dict, shape: dict) -> None:
    for name, kind in shape.items():
        if isinstance(kind, dict):
            assert set(document[name]) == set(kind), name
            fields(document[name], kind)
        else:
            assert type(document[name]) is kind, name


def test_the_file_has_every_field_of_the_seeds(steer, context: RunContext) -> None:
    result = steer(unit="absolute", strengths=[15.0])(context)
    document = json.loads((context.directory / "L0_S15.0.json").read_text())
    assert set(document) == {*SEED, "saekit"}
    fields(document, SEED)
    assert document["steering"] == {"feature_idx": 0, "strength": 15.0}
    assert document["feature_stats"]["indices"] == [0, 4, 3, 2, 1]
    assert document["prompt"] == "How to sort?"
    assert len(document["saekit"]["prompts"]) == 4
    stats = document["feature_stats"]
    assert stats["f_after"][0] - stats["f_before"][0] == pytest.approx(15.0, abs=1e-3)
    assert stats["g_before"] != stats["g_after"]
    assert set(result.files) == {path.name for path in context.directory.iterdir()}
    for case in document["saekit"]["prompts"]:
        assert len(case["tokens"]) == len(case["by_token"]["f_before"]) == len(case["by_token"]["g_after"])


def test_units_mean_what_they_say(steer, context: RunContext) -> None:
    in_max = steer(unit="max", strengths=[0.5])(context).tables["sweep"][1]
    assert in_max["of_max"] == pytest.approx(0.5)
    for unit, column in (("rms", "of_rms"), ("norm", "of_norm"), ("absolute", "absolute")):
        size = in_max[column]
        row = steer(unit=unit, strengths=[size])(context).tables["sweep"][1]
        assert row["absolute"] == pytest.approx(in_max["absolute"], rel=1e-5)
        assert row["kl"] == pytest.approx(in_max["kl"], rel=1e-3, abs=1e-8)


def test_a_latent_that_never_fires_is_a_null_result_with_its_reason(steer, context: RunContext) -> None:
    sae = context.sae
    kept = sae.b_enc.detach().clone()
    with torch.no_grad():
        sae.b_enc[0] = -1e3
    try:
        result = steer(unit="max")(context)
        assert not result.scalars
        assert "never fired" in result.notes[0]
        result = steer(unit="norm")(context)
        own = result.tables["cluster"][0]
        assert own["latent"] == own["delta_f at 1"] == 0  # the encoder does not respond, yet the model is steered
        assert result.scalars["gain"] is not None
    finally:
        with torch.no_grad():
            sae.b_enc.copy_(kept)


def test_without_a_graph_there_is_no_g(steer, context: RunContext) -> None:
    result = steer(strengths=[1.0])(dataclasses.replace(context, graph=None))
    document = json.loads((context.directory / "L0_S1.0norm.json").read_text())
    assert document["gnn"] == {"use_gnn": False, "top_k": 0}
    assert document["feature_stats"]["g_before"] is None
    assert result.scalars["delta_g_right"] is None
    assert any("no feature graph" in note for note in result.notes)


def test_the_same_run_gives_the_same_result(steer, context: RunContext) -> None:
    first, again = steer()(context), steer()(context)
    assert json.dumps(first.to_json()) == json.dumps(again.to_json())


def test_each_kind_has_its_own_figures_beside_controls(steer, context: RunContext) -> None:
    result = steer()(context)
    assert [row["kind"] for row in result.tables["sweep"]][::3] == [
        "questions",
        "neutral",
        "unrelated",
        "held-out text",
    ]
    kinds = [row["direction"] for row in result.tables["controls"]]
    assert kinds == ["latent", *["random"] * 2, *["random covariance"] * 2, *["other latent"] * 2]
    assert all(row["kl"] > 0 for row in result.tables["sweep"] if row["strength"])
    texts = result.tables["texts"]
    assert {(row["kind"], row["sampling"]) for row in texts} == {
        (kind, sampling) for kind in ("questions", "neutral", "unrelated") for sampling in ("greedy", "sampled")
    }
    assert {row["latent"] for row in result.tables["cluster"]} == {0, 1, 2, 3, 4}
    assert all(row["f_std_with"] >= 0 and "g_std_without" in row for row in result.tables["cluster"])
    sets = json.loads((context.directory / "typical_tokens.json").read_text())
    assert sets["concept"] == "even"
    assert sets["positive"]
    assert sets["negative"]


def test_it_is_said_whether_the_effect_exceeds_its_controls(steer, context: RunContext) -> None:
    result = steer()(context)
    rows = result.tables["controls"]
    of = {kind: [row["gain"] for row in rows if row["direction"] == kind] for kind in KINDS}
    own = of.pop("latent")[0]
    told = [AgainstControls.of(own, some).sentence("gain", KINDS[kind]) for kind, some in of.items()]
    assert result.notes[:3] == told  # before any other note
    for kind, some in of.items():
        assert result.scalars[f"{kind.replace(' ', '_')}_gain_max"] == max(some)
    assert any(note.startswith("The delta_f_right of ") for note in result.notes)


def test_a_null_effect_is_told_as_one(steer, context: RunContext) -> None:
    """Every latent has the same decoder row, so all others gain as much."""
    kept = context.sae.W_dec.detach().clone()
    with torch.no_grad():
        context.sae.W_dec[:] = context.sae.W_dec[0]
    try:
        notes = steer(strengths=[0.5])(dataclasses.replace(context, graph=None)).notes
    finally:
        with torch.no_grad():
            context.sae.W_dec.copy_(kept)
    assert re.match("The gain of .* does not (clearly )?exceed its controls: .*other latents", notes[2])


def test_without_controls_nothing_is_claimed(steer, context: RunContext) -> None:
    result = steer(strengths=[0.5], controls=0)(context)
    assert result.notes[0].startswith("Nothing was measured beside the latent")
    assert result.scalars["random_gain_mean"] is None


def test_the_page_needs_no_network_and_runs_no_foreign_script(steer, context: RunContext) -> None:
    source = context.source
    strings = source.token_strings
    source.token_strings = lambda tokens: ["</script><script>alert(1)</script>"] * len(tokens)
    try:
        steer(strengths=[1.0], pages=True)(context)
    finally:
        source.token_strings = strings
    text = (context.directory / "feature_0_L0_S1.0norm.html").read_text(encoding="utf-8")
    shell = text[: text.index("<script>")]
    assert "default-src 'none'" in shell.replace("&#x27;", "'")
    assert "alert(1)" in shell
    assert "</script><script>alert" not in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", shell)
    data = shell[shell.index('id="figures">') + len('id="figures">') : shell.rindex("</script>")]
    figures = json.loads(data)
    assert len(figures) == 4
    assert [trace["name"] for trace in figures[0]["pooled"]["data"]] == ["f before", "f after", "g before", "g after"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "no kinds"),
        ('{"neutral": []}', "'neutral' is not a list"),
        ('{"neutral": ["a"]}', "no kind 'unrelated'"),
        ('{"neutral": [" "], "unrelated": ["a"]}', "'neutral' is not a list"),
    ],
)
def test_a_file_of_prompts_that_is_none(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=says):
        Steer(prompts=str(path))


def test_a_prompt_longer_than_the_context_is_an_error_before_anything_runs(steer, context: RunContext) -> None:
    with pytest.raises(UsageError, match=r"the model takes 32. Shorten"):
        steer(max_new_tokens=25)(context)
    assert not list(context.directory.iterdir())


def test_bad_latents_and_strengths(steer, context: RunContext) -> None:
    with pytest.raises(UsageError, match="no latent 24"):
        steer(latent=24)(context)
    with pytest.raises(UsageError, match="all are 0"):
        steer(strengths=[0.0])


def test_one_class_alone_is_an_error(steer, context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = context.source.sequences

    def without(*arguments):
        batch = labelled(*arguments)
        batch.labels[:, 0] = 0
        return batch

    monkeypatch.setattr(context.source, "sequences", without)
    with pytest.raises(UsageError, match="label even = 1"):
        steer()(context)


def test_the_plugins_own_prompts() -> None:
    kinds = load_prompts(None)
    assert set(kinds) == {"code", "prose", "questions", "neutral", "unrelated"}
    assert all(len(texts) >= 8 for texts in kinds.values())
    assert next(iter(kinds.values()))[0] == "How to sort a list?"
    assert DEFAULT.is_file()


def test_a_judge_gives_numbers(steer, context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("a_judge")
    module.score = lambda prompt, before, after: {"longer": len(after) - len(before)}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_judge", module)
    rows = steer(judge="a_judge:score", strengths=[1.0])(context).tables["texts"]
    assert all("judge_longer" in row for row in rows)
    with pytest.raises(UsageError, match="module:function"):
        load_judge("a_judge")
    with pytest.raises(UsageError, match="cannot be imported"):
        load_judge("a_judge:nothing")
    with pytest.raises(UsageError, match="finite numbers"):
        judged(lambda *texts: {"x": float("nan")}, "", "", "")


def test_scores_of_texts(context: RunContext) -> None:
    assert distinct([1, 2, 1, 2], 1) == 0.5
    assert distinct([1, 2, 1, 2], 2) == pytest.approx(2 / 3)
    assert distinct([1], 2) is None
    subject = context.source.subject
    assert log_perplexity(subject, (0, 40), []) is None
    logits = subject.model(torch.tensor([[0, 40, 41, 42]])).logits.log_softmax(-1)
    expected = -(logits[0, 1, 41] + logits[0, 2, 42]) / 2
    assert log_perplexity(subject, (0, 40), [41, 42]) == pytest.approx(float(expected), rel=1e-4)
