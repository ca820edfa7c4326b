"""The method `strong` of the analyzer, on planted knowledge, in an SAE in which no latent tells the names apart."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from pydantic import TypeAdapter
from saekit_unlearning import strong_method
from saekit_unlearning.data import UnlearningData
from saekit_unlearning.edited import Edited, copied
from saekit_unlearning.edits import PATHS, Pushing, parts_of
from saekit_unlearning.methods import Prepared, Seen
from saekit_unlearning.push import train_rows
from saekit_unlearning.strong_method import DIRECTORY, Strong
from saekit_unlearning.unlearn import Unlearn

from saekit import (
    Activations,
    OptionError,
    Registry,
    Result,
    SparseAutoencoder,
    TokenBatch,
    TrainedPositions,
    UsageError,
    load_sae,
)

GENERAL = ["the house is old and young", "where is the house of here", "now there is a house in the old house"]
RANDOM_ROWS, MATCHED = "draws of random rows on the same latents", "draws of rows trained on matched random latents"
OPTIONS = {"methods": ["strong"], "push_targets": ["uniform"], "push_steps": [60], "draws": 4}


def dictionary(planted, name: str = "standard", **options) -> SparseAutoencoder:
    """An SAE that rebuilds every word. Of a pair of names Fo0 and Ne0 one latent fires on both, and another on Ne0 alone, so that
    no latent of its own detects a name that is to be forgotten."""
    rows = {word: planted.directions[word] / 3.0 for word in planted.words}
    encoder, decoder = dict(rows), dict(rows)
    for i in range(4):
        forgotten, kept = f"Fo{i}", f"Ne{i}"
        encoder[forgotten], encoder[kept] = rows[forgotten] + rows[kept], rows[kept] - rows[forgotten]
        decoder[kept] = rows[kept] - rows[forgotten]
    component = Registry().find("architecture", name)
    sae = component.build(component.validate(options, name), 48, len(rows))
    with torch.no_grad():
        for parameter, value in sae.latent_parameters.items():
            getattr(sae, parameter).fill_(value)
        sae.W_enc.copy_(torch.stack(list(encoder.values())).T)
        sae.W_dec.copy_(torch.stack(list(decoder.values())))
        sae.b_dec.zero_()
    return sae.eval().requires_grad_(False)


@pytest.fixture
def trained(monkeypatch) -> list[int]:
    """How many latents' rows were trained, each time; with steps that suit this model."""
    calls: list[int] = []

    def counted(site, parts, *args, **options):
        found = train_rows(site, parts, *args, lr=0.15, batch=8, **options)
        calls.append(len(found.rows))
        return found

    monkeypatch.setattr(strong_method, "train_rows", counted)
    return calls


@pytest.fixture
def analyse(planted, tmp_path, trained):
    """From an SAE, its architecture and options to (the result, the context)."""
    table = TypeAdapter(UnlearningData).dump_python(planted.data, mode="json")
    table["texts"] = [text for text in table["texts"] if not text["text"].startswith("here")]  # that wording's questions are unseen
    for kind in ("texts", "questions"):
        (tmp_path / f"{kind}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in table[kind]), encoding="utf-8")
    texts = [planted.subject.tokenizer(text)["input_ids"] for text in GENERAL]

    def run(sae: SparseAutoencoder | None = None, architecture: str = "standard", **options) -> tuple[Result, SimpleNamespace]:
        subject, words = planted.subject, torch.stack([planted.directions[word] for word in planted.words])
        context = SimpleNamespace(
            sae=dictionary(planted) if sae is None else sae,
            source=SimpleNamespace(
                subject=subject, hook_point="middle", token_batches=lambda split, rows: iter([TokenBatch.of_rows(texts)])
            ),
            config=SimpleNamespace(architecture=SimpleNamespace(use=architecture), evaluation=SimpleNamespace(tokens=100)),
            held_out_activations=lambda tokens: iter([Activations(words)]),
            directory=tmp_path / "analysis",
            seed=0,
            warn=lambda _: None,
        )
        return Unlearn(data=str(tmp_path), **{**OPTIONS, **options})(context), context

    return run


class Kept(Strong):
    """The method, which keeps its trials."""

    def prepare(self, seen: Seen) -> Prepared:
        self.prepared = super().prepare(seen)
        return self.prepared


def row(result: Result, path: str) -> dict:
    (found,) = (r for r in result.tables["methods"] if r["path"] == path)
    return found


@pytest.mark.parametrize(("architecture", "options"), [("standard", {}), ("topk", {"k": 6})])
def test_names_are_forgotten_on_both_paths_and_others_stay(planted, analyse, trained, architecture, options) -> None:
    sae = dictionary(planted, architecture, **options)
    before = copy.deepcopy(sae.state_dict())
    result, context = analyse(sae, architecture)
    for path in PATHS:
        found = row(result, path)
        assert found["candidates"] == 4 and found["reason_of_zero"] is None
        assert found["forget"] == 0 and found["forget_n"] == 4
        assert found["near_shown"] == found["near_never_shown"] == found["score"] == 1
        assert found["near_never_shown_n"] == 3
        controls = {r["control"]: r for r in result.tables["controls"] if r["path"] == path}
        assert set(controls) == {RANDOM_ROWS, MATCHED}
        assert all(one["exceeds"] and one["effect"] == 1 and one["best"] < 0.5 for one in controls.values())
        assert all(any(what in note and "exceeds" in note for note in result.notes) for what in controls)
    assert trained == [4] * 5  # the method's and each draw's, once for both paths
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.sae.state_dict().items())


def test_the_saved_sae_computes_the_same_and_its_own_latents_rebuild(planted, analyse, monkeypatch) -> None:
    kept = Kept(["uniform"], [60], PATHS)
    monkeypatch.setattr(Unlearn, "_methods", lambda self: [kept])
    result, context = analyse(draws=0)
    loaded, n = load_sae(context.directory / DIRECTORY), context.sae.d_sae
    roles = json.loads((context.directory / DIRECTORY / "cfg.json").read_text())["metadata"]
    assert roles["hook_name"] == "middle"
    assert roles["unlearning"] == {"reconstruction": [0, n], "push": {str(n + i): f"Fo{i}" for i in range(4)}}
    assert all((context.directory / file).is_file() for file in result.files) and len(result.files) == 2
    assert torch.equal(loaded.W_dec[:n], context.sae.W_dec) and torch.equal(loaded.W_enc[:, :n], context.sae.W_enc)
    trials = {trial.path: trial for trial in kept.prepared.trials}
    rows = [planted.subject.tokenizer(text.text)["input_ids"] for text in planted.data.texts]
    for passages in planted.site.passages(rows):
        spliced = planted.site.logits(passages, lambda p: p.with_x(loaded(p.x)))
        torch.testing.assert_close(spliced, trials["spliced"].logits(passages), rtol=1e-4, atol=1e-2)
        push = torch.arange(n, n + 4)
        added = Pushing(parts_of(loaded, push, "error_kept"), loaded.W_dec[push])
        kept_error = trials["error_kept"].logits(passages)
        torch.testing.assert_close(planted.site.logits(passages, added), kept_error, rtol=1e-4, atol=1e-2)
    assert result.scalars["strong_explained_variance_own_latents"] == pytest.approx(1.0)
    assert result.scalars["strong_explained_variance_pushing"] < 0.9  # rows that push do not rebuild
    assert result.scalars["strong_pushed_share"] == pytest.approx(4 / len(planted.words))
    assert any("saekit.load_sae reads it" in note for note in result.notes)


def test_every_target_and_number_of_steps_is_a_setting(analyse) -> None:
    result, _ = analyse(push_targets=["uniform", "others"], push_steps=[1, 60], paths=["error_kept"], draws=0)
    settings = [r["setting"] for r in result.tables["settings"]]
    assert settings == [f"pushed to {target}, {steps} steps" for target in ("uniform", "others") for steps in (1, 60)]
    assert result.tables["controls"] == [] and "exceeds_controls" not in row(result, "error_kept")


def test_a_gate_that_silences_detectors_is_a_zero_with_its_reason(planted, analyse) -> None:
    sae = dictionary(planted, "topk", k=1)
    with torch.no_grad():
        sae.b_enc[0] = 1e12  # always takes the only place
    result, context = analyse(sae, "topk")
    for path in PATHS:
        found = row(result, path)
        assert found["candidates"] == found["score"] == found["settings"] == 0
        assert "Take an SAE of another architecture" in found["reason_of_zero"]
    assert any("has a score of zero" in note and "Take an SAE of another architecture" in note for note in result.notes)
    assert not context.directory.exists() and result.files == []


@pytest.mark.parametrize("path", PATHS)
def test_gradients_reach_the_layers_below_through_a_push_that_stays(planted, path) -> None:
    """As relearning needs it; the second time the push is written out, with autograd through it."""
    sae, push = dictionary(planted).double(), torch.tensor([planted.words.index("Fo0"), planted.words.index("house")])
    rows = torch.randn(2, 48, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    site = copied(planted.site)
    model = site.subject.model.double()
    weight = model.embedding.weight.requires_grad_(True)
    tokens = torch.tensor([planted.subject.tokenizer("now Fo0 is in a house")["input_ids"]])

    def gradient(logits: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(logits.log_softmax(-1)[..., 0].sum(), weight)[0]

    edited = Edited("", site, True, Pushing(parts_of(sae, push, path), rows))
    found = gradient(edited.whole(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    x = weight[tokens[0]]
    code = (x @ sae.W_enc).relu()  # every bias is zero
    moved = (x if path == "error_kept" else code @ sae.W_dec) + code[:, push] @ rows
    keep = TrainedPositions(True).in_rows(tokens)[0]
    expected = gradient(torch.where(keep[:, None], moved, x).cumsum(0) @ model.unembedding)
    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected)


def test_latents_that_are_never_active_before_an_answer_push_nothing(analyse, monkeypatch) -> None:
    monkeypatch.setattr(strong_method, "matched_latents", lambda chosen, *_: [0])  # <s> is in no text
    result, _ = analyse(paths=["error_kept"])
    (found,) = (r for r in result.tables["controls"] if r["control"] == MATCHED)
    assert found["controls"] == 4 and found["best"] == 0


@pytest.mark.parametrize("option", [{"push_targets": ["oracle"]}, {"push_targets": []}, {"push_steps": [0]}, {"push_steps": []}])
def test_bad_options_are_refused(option) -> None:
    with pytest.raises(UsageError, match=rf"unlearn\.{next(iter(option))}"):
        Registry().find("analyzer", "unlearn").validate(option, "analyzer.unlearn")


def test_other_text_is_needed(planted) -> None:
    with pytest.raises(OptionError, match="leaves strong no other text"):
        Unlearn(methods=["strong"], general_tokens=0)
