"""Detectors, the rows that they push with, and both inside a dictionary, on planted knowledge."""

from __future__ import annotations

import pytest
import torch
from saekit_unlearning.answers import Examination
from saekit_unlearning.data import FORGET
from saekit_unlearning.detectors import Detectors, choices, detectors_for, examples, fit, recombined
from saekit_unlearning.edits import PATHS, Pushing, parts_of
from saekit_unlearning.grown import LIFT, grown, save_grown, with_rows
from saekit_unlearning.places import batches, placed
from saekit_unlearning.push import train_rows
from saekit_unlearning.strong import beside

from saekit import Registry, SparseAutoencoder, UsageError, load_sae

GENERAL = ["the house is old and young", "where is the house of here", "now there is a house in the old house"]
ARCHITECTURES = {"topk": {"k": 3}, "batchtopk": {"k": 3}, "jumprelu": {"threshold": 0.2}, "gated": {}, "standard": {}}


@pytest.fixture
def detectors(planted) -> Detectors:
    return detectors_for(planted.site, planted.data, GENERAL)[0]


def rows_of(planted, texts) -> list[list[int]]:
    return [placed(planted.subject.tokenizer, text, whole=True).tokens for text in texts]


def known(planted, edit=None) -> float:
    """The mean probability of the right answer on the texts that are to be forgotten."""
    every = [placed(planted.subject.tokenizer, text) for text in planted.data.forget]
    found = []
    for batch in batches(planted.site, every, len(every)):
        p = planted.site.logits(batch.passages, edit).softmax(-1)
        for row, text in enumerate(batch.texts):
            place = int(batch.predicting[row].nonzero()[0])
            found.append(float(p[row, place, planted.words.index(text.text[slice(*text.answer)])]))
    return sum(found) / len(found)


def dictionary(planted, name: str) -> SparseAutoencoder:
    """An SAE whose latents are the model's words, so that it rebuilds everything."""
    component = Registry().find("architecture", name)
    sae = component.build(component.validate(ARCHITECTURES[name], name), 48, len(planted.words))
    directions = torch.stack([planted.directions[word] for word in planted.words]) / 3.0
    with torch.no_grad():
        for parameter, value in sae.latent_parameters.items():
            getattr(sae, parameter).fill_(value)
        sae.W_enc.copy_(directions.T)
        sae.W_dec.copy_(directions)
        sae.b_dec.zero_()
        if name == "batchtopk":
            sae.threshold.fill_(0.5)
    return sae.eval().requires_grad_(False)


def test_a_text_is_placed_by_its_tokenizer(planted):
    text = planted.data.texts[0]
    one = placed(planted.subject.tokenizer, text, whole=True)
    words = [planted.words[i] for i in one.tokens]
    assert words[one.name] == text.entity
    assert [words[i + 1] for i in one.answer] == [text.text[slice(*text.answer)]]


def test_each_detector_fires_at_its_own_name_and_nowhere_else(planted, detectors):
    assert detectors.entities == tuple(sorted({t.entity for t in planted.data.forget}))
    words = torch.stack([planted.directions[word] for word in planted.words])
    expected = torch.tensor([[word == entity for entity in detectors.entities] for word in planted.words])
    assert torch.equal(detectors(words) > 0, expected)
    own = detectors.scores(words)[expected]
    torch.testing.assert_close(own, torch.ones_like(own), rtol=1e-3, atol=1e-3)


def test_what_was_left_out_of_a_fit_counts_what_a_shifted_threshold_would_do(planted):
    data = examples(
        planted.site, [*planted.data.forget, *planted.data.retain], [], rows_of(planted, planted.data.retain)
    )
    tried = choices(data, folds=3)
    assert all(one.detected == 1.0 and one.false == 0.0 for one in tried)  # one token a name: nothing varies
    assert {one.margin for one in tried} > {0.1, 0.3}
    deaf = fit(data, l2=1e-4, margin=-0.5)  # a threshold above every own score
    assert not bool((deaf.scores(data.names) > deaf.threshold).any())


def test_made_up_names_are_of_two_halves_and_of_nobody(planted):
    names = {text.entity for text in planted.data.texts}
    for text in recombined(planted.data.forget, 0, 20):
        assert text.group != FORGET
        assert text.text[slice(*text.name)] == text.entity not in names
        assert text.text[slice(*text.answer)][0].isupper()


def test_rows_make_the_model_forget_and_leave_all_else_to_the_bit(planted, detectors):
    parts = beside(detectors)
    pushed = train_rows(
        planted.site, parts, planted.data.forget, rows_of(planted, planted.data.retain), steps=60, lr=0.15, batch=8
    )
    edit = Pushing(parts, pushed.rows)
    exam = Examination(planted.site, planted.data.questions)
    right = exam.right(edit)
    about = [q.group == FORGET for q in exam.questions]
    assert exam.right().all()
    assert known(planted) > 0.9
    assert known(planted, edit) < 0.2
    assert right[[not one for one in about]].all()
    assert pushed.forget[-1] < 0.2 * pushed.forget[0]
    assert not pushed.retain.any()
    (passages,) = planted.site.passages(rows_of(planted, [t for t in planted.data.texts if t.group != FORGET]))
    assert torch.equal(planted.site.logits(passages, edit), planted.site.logits(passages))
    untrained = Pushing(parts, torch.zeros_like(pushed.rows))
    assert known(planted, untrained) == known(planted)


@pytest.mark.parametrize("target", ["others", "oracle"])
def test_rows_reach_what_a_model_says_that_does_not_know(planted, detectors, target):
    def oracle(batch):  # knows no name
        return torch.zeros(*batch.tokens.shape, len(planted.words))

    pushed = train_rows(
        planted.site,
        beside(detectors),
        planted.data.forget,
        [],
        target=target,
        oracle=oracle,
        steps=60,
        lr=0.15,
        batch=8,
    )
    assert pushed.forget[-5:].mean() < 0.3 * pushed.forget[0]


def test_latents_that_never_fire_cannot_be_trained(planted):
    silent = Detectors(("Fo0",), torch.zeros(48, 1), torch.zeros(1), torch.ones(1))
    with pytest.raises(UsageError, match="none of the latents fires"):
        train_rows(planted.site, beside(silent), planted.data.forget, [])


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_inside_a_dictionary_the_latents_fire_as_the_detectors_and_the_rest_rebuilds_as_before(
    planted, detectors, name, tmp_path
):
    sae = dictionary(planted, name)
    words = torch.stack([planted.directions[word] for word in planted.words])
    new, latents = grown(sae, name, detectors, words)
    assert torch.equal(new.encode(words).columns(latents) > 0, detectors(words) > 0)
    others = [word not in detectors.entities for word in planted.words]
    torch.testing.assert_close(new(words[others]), sae(words[others]))
    pushed = train_rows(planted.site, parts_of(new, latents, "spliced"), planted.data.forget, [], steps=60, lr=0.15, batch=8)
    with_rows(new, latents, pushed.rows)
    metadata = {"model_name": "planted"}
    save_grown(new, tmp_path, name=name, latents=latents, detectors=detectors, metadata=metadata)
    loaded = load_sae(tmp_path)
    torch.testing.assert_close(loaded(words), new(words))
    without, _ = grown(sae, name, detectors, words)
    for path in PATHS:
        assert known(planted, Pushing(parts_of(without, latents, path), pushed.rows)) < 0.3
    # Splicing in the saved SAE as it is does the same as the path "spliced".
    spliced = Pushing(parts_of(without, latents, "spliced"), pushed.rows)
    (passages,) = planted.site.passages(rows_of(planted, planted.data.forget))
    torch.testing.assert_close(spliced(passages)[passages.keep], loaded(passages.x), rtol=1e-4, atol=1e-3)
    assert (tmp_path / "cfg.json").read_text().count('"push"') == 1
    assert LIFT > 1


def test_a_gate_that_silences_the_detectors_is_refused(planted, detectors):
    sae = dictionary(planted, "topk")
    few = type(sae)(48, 4, k=1).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in few.parameters():
            parameter.zero_()
        few.W_enc[:, 0] = 1e9  # always wins the only place
        few.b_enc[0] = 1e12
    words = torch.stack([planted.directions[word] for word in planted.words])
    with pytest.raises(UsageError, match="Take an SAE of another architecture"):
        grown(few, "topk", detectors, words)
