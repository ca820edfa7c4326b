"""Gates close on planted latents alone."""

from __future__ import annotations

import pytest
import torch
from saekit_unlearning.data import FORGET
from saekit_unlearning.edits import PATHS
from saekit_unlearning.gates import fit_gates
from saekit_unlearning.places import placed


@pytest.mark.parametrize("path", PATHS)
def test_gates_close_on_the_latents_of_what_is_to_be_forgotten_and_on_no_other(planted, path):
    sae = planted.sae()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    retain = [placed(planted.subject.tokenizer, text, whole=True).tokens for text in planted.data.retain]
    latents = torch.arange(len(planted.words))
    found = fit_gates(planted.site, sae.requires_grad_(False), latents, path, planted.data.forget, retain, steps=150)
    forgotten = {planted.words.index(text.entity) for text in planted.data.texts if text.group == FORGET}
    assert set(found.closed().tolist()) == forgotten
    others = [i for i in latents.tolist() if i not in forgotten]
    assert found.gates[others].min() > 0.8
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
