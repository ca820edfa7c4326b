"""`concept_recovery` finds latents that are planted, says so of none that are not, and chooses on training data alone."""

import types

import pytest
import torch
from saekit_contrastive.concept_recovery import ConceptRecovery
from saekit_contrastive.labelled_rows import Entries, LabelledRows, best_latent, best_neuron, ranks_of
from sklearn.metrics import roc_auc_score

from saekit import Activations, ComponentError
from saekit.testing import make_step

D_IN, CONCEPTS = 16, ("near", "far", "none")


def planted(split: str, n: int, *, told: bool = True) -> Activations:
    """Rows of noise to which concept 0 adds direction 3, and concept 1 takes direction 5 away; the third is random."""
    draws = torch.Generator().manual_seed(int(split == "train"))
    labels = (torch.rand(n, 3, generator=draws) < 0.3).float()
    x = 0.3 * torch.randn(n, D_IN, generator=draws)
    if told:
        x[:, 3] += 3 * labels[:, 0]
        x[:, 5] -= 3 * labels[:, 1]
    labels[::7, 2] = torch.nan
    return Activations(x, labels=labels, sequence=torch.arange(n) // 2)


def context_of(**options) -> types.SimpleNamespace:
    sae = make_step(architecture="topk", options={"k": 3}, d_in=D_IN, d_sae=32).sae
    with torch.no_grad():  # latent 7 reads direction 3 alone, latent 9 the opposite of direction 5
        for latent, direction in ((7, torch.eye(D_IN)[3]), (9, -torch.eye(D_IN)[5])):
            sae.W_enc[:, latent] = 4 * direction
            sae.W_dec[latent] = direction
    return types.SimpleNamespace(
        sae=sae, seed=0, scale=1.0, device=torch.device("cpu"), source=types.SimpleNamespace(concepts=CONCEPTS),
        training_activations=lambda tokens: [planted("train", tokens, **options)],
        held_out_activations=lambda tokens: [planted("held_out", tokens, **options)],
    )  # fmt: skip


def test_planted_latents_are_found_and_others_are_not():
    found = ConceptRecovery(tokens=1200)(context_of())
    near, far, none = found.tables["concepts"]
    assert near["latent"] == 7 and near["auroc"] > 0.95 and far["latent"] == 9 and far["auroc"] > 0.95
    assert near["low"] <= near["auroc"] <= near["high"] and none["low"] < 0.5 < none["high"]
    assert near["neuron"] > 0.95 and far["neuron"] > 0.95  # of either sign
    assert all(abs(row["shuffled"] - 0.5) < 0.1 for row in found.tables["concepts"])
    assert near["probe"] > 0.95 and abs(none["probe"] - 0.5) < 0.1
    assert found.scalars["recovered_share"] == pytest.approx(2 / 3) and found.scalars["recovered_share_n"] == 3
    assert "tells 2 of 3 concepts" in found.notes[0] and "no more than its controls" in found.notes[0]  # neurons tell them too
    assert "Not recovered: none" in " ".join(found.notes)
    assert len(found.figures["concepts"]["data"]) == 5


def test_without_anything_to_find_nothing_is_found():
    found = ConceptRecovery(tokens=1200)(context_of(told=False))
    assert found.scalars["recovered_share"] == 0 and all(abs(row["auroc"] - 0.5) < 0.1 for row in found.tables["concepts"])


def test_the_best_unit_is_that_of_sklearn():
    draws = torch.Generator().manual_seed(3)
    x = (4 * torch.rand(200, 9, generator=draws)).round()  # with ties
    labels = (torch.rand(200, generator=draws) < 0.3).float()
    expected = [roc_auc_score(labels, column) for column in x.T]
    neuron = best_neuron(ranks_of(x), labels)
    assert max(expected + [1 - value for value in expected]) == pytest.approx(neuron.auroc)
    assert expected[neuron.unit] == pytest.approx(neuron.auroc if neuron.sign > 0 else 1 - neuron.auroc)
    rows, units = x.nonzero(as_tuple=True)
    entries = Entries(rows, units, x[rows, units], 9)
    assert best_latent(entries, labels, against=False).auroc == pytest.approx(max(expected))
    assert torch.equal(entries.column(4, 200), x[:, 4])


@pytest.mark.parametrize("labels", [None, torch.full((8, 3), torch.nan)])
def test_without_labels_the_error_says_what_to_do(labels):
    with pytest.raises(ComponentError, match=r"none of the activations has a label. Raise tokens, or label more"):
        LabelledRows.of([Activations(torch.zeros(8, D_IN), labels=labels)])


def test_a_concept_of_one_value_is_left_out_and_said():
    context = context_of()
    whole = context.held_out_activations(400)
    whole[0].labels[:, 1] = 1.0
    context.held_out_activations = lambda tokens: whole
    found = ConceptRecovery(tokens=400)(context)
    assert [row["concept"] for row in found.tables["concepts"]] == ["near", "none"] and "Left out" in found.notes[-1]
    whole[0].labels[:] = 1.0
    with pytest.raises(ComponentError, match="no concept occurs as both 0 and 1 in each split"):
        ConceptRecovery(tokens=400)(context)
