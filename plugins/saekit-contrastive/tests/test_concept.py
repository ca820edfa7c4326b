from __future__ import annotations

import pytest
import torch
from saekit_contrastive.class_contrast import FORMS, contrast
from saekit_contrastive.concept import Concept, ConceptRows, resolve_latents

from saekit import UsageError

CONCEPTS = ["code", "prose"]


def killed(sae, latent: int = 0):
    """The SAE with a latent that never fires."""
    with torch.no_grad():
        (sae.b_gate if sae.b_enc is None else sae.b_enc)[latent] = -50.0
    return sae


@pytest.mark.parametrize("architecture", ["topk", "standard", "batchtopk", "jumprelu", "gated"])
def test_the_form_activation_teaches_a_silent_latent_nothing(kit, architecture: str) -> None:
    """`-(mu_pos - mu_neg)` through the gate is 0 where the latent is silent, as it often is at the start, and so is its slope."""
    sae = killed(kit.step_of(architecture=architecture, options={}).sae)
    step = kit.step_of(sae)
    assert not step.sequences.code.column(0).any()
    value = kit.prepared(Concept(latents={"code": 0}, form="activation"), sae)(step)
    assert value == 0
    gradient = torch.autograd.grad(value, sae.W_enc, allow_unused=True)[0]
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
def test_the_form_activation_is_the_difference_of_mean_activations(kit, architecture: str) -> None:
    step = kit.step_of(architecture=architecture, options={})
    batch = step.sequences
    latent = int(batch.code.fired().argmax())
    f, y = batch.code.column(latent), batch.labels[batch.mask.nonzero()[:, 0], 0]
    expected = f[y == 0].mean() - f[y == 1].mean()
    value = kit.prepared(Concept(latents={"code": latent}, form="activation"), step.sae)(step)
    torch.testing.assert_close(value, expected)
    gradient, wanted = (torch.autograd.grad(v, step.sae.W_enc, retain_graph=True)[0] for v in (value, expected))
    assert gradient[:, latent].any()
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "activation"])
@pytest.mark.parametrize("architecture", ["topk", "standard", "batchtopk", "jumprelu", "gated"])
def test_a_dead_latent_is_moved(kit, form, architecture: str) -> None:
    sae = killed(kit.step_of(architecture=architecture, options={}).sae)
    step = kit.step_of(sae)
    assert not step.sequences.code.column(0).any()
    for on in ("tokens", "sequences"):
        value = kit.prepared(Concept(latents={"code": 0}, form=form, on=on), sae)(step)
        moved = torch.autograd.grad(value, sae.W_enc)[0]
        assert moved[:, 0].abs().max() > 1e-4
        assert not moved[:, 1:].any()


@pytest.mark.parametrize("loss", [Concept, ConceptRows])
@pytest.mark.parametrize("form", FORMS)
def test_scaling_the_encoder_and_the_decoder_changes_nothing_but_raw(kit, loss, form) -> None:
    step = kit.step_of()
    other = kit.step_of(kit.scaled(step.sae, 7.0))
    torch.testing.assert_close(other.reconstruction, step.reconstruction)
    value, after = (kit.prepared(loss(form=form), s.sae)(s) for s in (step, other))
    if form in ("activation", "raw"):
        torch.testing.assert_close(after, 7 * value)
    else:
        torch.testing.assert_close(after, value)


def test_values_against_the_definition(kit) -> None:
    step = kit.step_of()
    batch = step.sequences
    sequence = batch.mask.nonzero()[:, 0]
    scores = batch.code.margin(torch.tensor([5]))[:, 0]
    tokens = kit.prepared(Concept(latents={"prose": 5}), step.sae)(step)
    torch.testing.assert_close(tokens, contrast(scores, batch.labels[sequence, 1]))
    means = torch.stack([scores[sequence == i].mean() for i in range(len(batch))])
    pooled = kit.prepared(Concept(latents={"1": 5}, on="sequences"), step.sae)(step)
    torch.testing.assert_close(pooled, contrast(means, batch.labels[:, 1]))
    rows = kit.prepared(ConceptRows(latents={"prose": 5}), step.sae)(step)
    torch.testing.assert_close(rows, contrast(step.code.margin(torch.tensor([5]))[:, 0], step.labels[:, 1]))
    both = kit.prepared(Concept(), step.sae)(step)
    each = [kit.prepared(Concept(latents={name: n}), step.sae)(step) for n, name in enumerate(CONCEPTS)]
    torch.testing.assert_close(both, torch.stack(each).mean())


@pytest.mark.parametrize("loss", [Concept, ConceptRows])
def test_shuffled_labels_are_the_same_labels_in_another_order(kit, monkeypatch, loss) -> None:
    step, seen = kit.step_of(batch=12, sequences=torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 9)), []
    monkeypatch.setattr(
        "saekit_contrastive.concept.mean_contrast", lambda scores, labels, *_: seen.append(labels) or scores.sum()
    )
    torch.manual_seed(0)
    for part in (loss(), loss(shuffled=True), loss(shuffled=True)):
        kit.prepared(part, step.sae)(step)
    true, first, second = seen
    assert not torch.equal(true, first) and not torch.equal(first, second)
    if loss is ConceptRows:
        assert torch.equal(true.nan_to_num(-1).unique(dim=0), first.nan_to_num(-1).unique(dim=0))


@pytest.mark.parametrize("loss", [Concept, ConceptRows])
def test_what_it_says_of_a_step_is_computed_from_activations_by_true_labels(kit, loss) -> None:
    step = kit.step_of()
    code, labels = step.code, step.labels
    if loss is Concept:
        code, labels = step.sequences.code, step.sequences.labels[step.sequences.mask.nonzero()[:, 0]]
    latent = int(code.fired().argmax())
    f, y = code.column(latent), labels[:, 0]
    said = kit.prepared(loss(latents={"code": latent}, shuffled=True), step.sae).measures(step)
    assert said == {
        "e_pos": f[y == 1].mean(),
        "firing_pos": (f[y == 1] != 0).double().mean(),
        "e_neg": f[y == 0].mean(),
        "firing_neg": (f[y == 0] != 0).double().mean(),
    }
    assert "e_pos_prose" in kit.prepared(loss(), step.sae).measures(step)


def differing(sae):
    """The SAE, its latents with biases and thresholds that differ."""
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.shape == (sae.d_sae,):
                parameter.add_(0.5 * torch.randn(sae.d_sae, generator=draws).to(parameter))
        sae.constrain_weights()
    return sae


@pytest.mark.parametrize(
    "architecture", ["topk", "standard", "clipped", "jumprelu", "gated", "batchtopk", "matryoshka", "hsae"]
)
@pytest.mark.parametrize("loss", [Concept, ConceptRows])
def test_a_positive_score_fires_and_a_negative_one_does_not(kit, monkeypatch, loss, architecture: str) -> None:
    """Positive scores that were silent when a score was counted from the row's smallest activation: jumprelu .85, gated .34."""
    options = {"base": {"use": "jumprelu"}} if architecture == "hsae" else {}
    step = kit.step_of(differing(kit.step_of(architecture=architecture, options=options).sae))
    code = step.sequences.code if loss is Concept else step.code
    seen = []
    monkeypatch.setattr(
        "saekit_contrastive.concept.mean_contrast", lambda scores, *_: seen.append(scores) or scores.sum()
    )
    for latent in range(0, 64, 2):
        kit.prepared(loss(latents={"code": latent, "prose": latent + 1}), step.sae)(step)
    scores = torch.cat(seen, 1)  # [rows, 64]
    fires = code.dense() != 0
    assert fires[scores > 1e-9].all() and not fires[scores < -1e-9].any()
    assert (scores > 1e-9).any() and (scores < -1e-9).any()


@pytest.mark.parametrize(
    ("latents", "part"),
    [
        ({"poetry": 0}, "poetry"),
        ({"code": 64}, "64"),
        ({"code": -1}, "-1"),
        ({"2": 0}, "'2'"),
        ({}, "empty"),
        ({"code": 0, "prose": 0}, "twice"),
        ({"code": 0, "0": 1}, "twice"),
    ],
)
def test_wrong_latents_are_refused_with_the_key(kit, latents, part: str) -> None:
    with pytest.raises(UsageError, match=r"^latents: ") as error:
        kit.prepared(Concept(latents=latents), kit.step_of().sae)
    assert part in str(error.value)


def test_more_concepts_than_latents_are_refused() -> None:
    with pytest.raises(UsageError, match="latent 1"):
        resolve_latents(None, CONCEPTS, 1)
    with pytest.raises(UsageError, match="no concepts"):
        resolve_latents(None, [], 8)


@pytest.mark.parametrize("loss", [Concept, ConceptRows])
@pytest.mark.parametrize("fill", [0.0, 1.0, torch.nan])
def test_one_class_alone_is_refused_before_training_and_says_nothing_in_a_step(kit, loss, fill: float) -> None:
    sae = kit.step_of().sae
    with pytest.raises(UsageError, match="code"):
        kit.prepared(loss(latents={"code": 0}), sae, torch.full((4, 2), fill))
    part = kit.prepared(loss(latents={"code": 0}), sae)
    one = torch.full((12, 2), fill)
    assert not part.active(kit.step_of(sae, sequences=one, labels=one, batch=12))
    assert part.active(kit.step_of(sae))
