"""The loss `kl_unlearn`: what it takes each step, and that its gradient teaches an SAE to forget."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from saekit_unlearning.kl_unlearn import KLUnlearn

from saekit import Activations, Step


class OfPlanted(KLUnlearn):
    """With the data of the planted model."""


def prepared(planted, scale: float = 1.0, **options):
    """(the loss, an SAE that rebuilds the site, a step maker)."""
    sae = planted.sae()
    OfPlanted.read = staticmethod(lambda data: planted.data)
    loss = OfPlanted(**options)
    source = SimpleNamespace(subject=planted.subject)
    loss.prepare(SimpleNamespace(source=source, sae=sae, scale=scale, seed=0))
    x = torch.stack(list(planted.directions.values()))
    return loss, sae, lambda number: Step.of(sae, Activations(x), scale, scale, number=number)


def test_its_value_does_not_depend_on_the_scale_of_training(planted):
    values = []
    for scale in (1.0, 4.0):
        loss, _, step = prepared(planted, scale)
        values.append(loss(step(3)))
    torch.testing.assert_close(*values)


def test_a_step_takes_the_same_texts_whenever_it_is_asked(planted):
    loss, _, step = prepared(planted, texts=2)
    first = [loss(step(number)).item() for number in range(8)]
    assert [loss(step(number)).item() for number in reversed(range(8))] == first[::-1]
    assert len({tuple(loss._at(loss._forget, number).passages.tokens.flatten().tolist()) for number in range(8)}) > 1


def test_it_applies_every_so_many_steps(planted):
    loss, _, step = prepared(planted, every=3)
    assert [loss.active(step(number)) for number in range(4)] == [True, False, False, True]


def test_steps_along_its_gradient_make_the_model_forget_and_keep_the_rest(planted):
    loss, sae, step = prepared(planted, retain_weight=3.0)
    optimizer = torch.optim.Adam([sae.W_dec], lr=0.05)
    before = loss(step(0)).item()
    for number in range(60):
        optimizer.zero_grad()
        loss(step(number)).backward()
        optimizer.step()
    assert loss(step(60)).item() < 0.5 * before
    assert all(p.grad is None for p in planted.subject.model.parameters())
