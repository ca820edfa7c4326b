from __future__ import annotations

import dataclasses

import pytest
import torch
from saekit_contrastive.concept import Concept
from saekit_contrastive.concept_auroc import ConceptAUROC

from saekit import Registry, RunContext, Step
from saekit.estimate import value_of
from saekit.run_file import parse_config
from saekit.testing.fixtures import build_sae
from saekit.testing.tiny import tiny_table

CONCEPTS = [0, 1, 2]


def draws():
    return torch.Generator().manual_seed(0)


def source_of():
    component = Registry().find("source", "synthetic")
    given = {"d_in": 48, "n_features": 64, "probability": 0.04, "concepts": CONCEPTS, "held_out": 6000}
    source = component.build(component.validate(given, "source"))
    source.open(device=torch.device("cpu"), dtype=torch.float32)
    return source


def trained(source, loss: Concept | None, architecture: str, tmp_path):
    """An SAE whose latents 0, 1 and 2 are dead at the start, after 300 steps; and its context."""
    component = Registry().find("architecture", architecture)
    x = next(source.blocks("train", size=512, seed=0)).x
    sae = build_sae(component, {}, x, d_in=48, d_sae=96)
    with torch.no_grad():
        sae.b_enc[: len(CONCEPTS)] = -3.0
        if architecture == "jumprelu":  # thresholds that differ, as after a training
            sae.threshold.copy_(torch.linspace(0.0, 2.0, sae.d_sae)[torch.randperm(sae.d_sae, generator=draws())])
    context = RunContext(
        sae, source, parse_config(tiny_table(), "a tiny run"), torch.device("cpu"), tmp_path, lambda message: None
    )
    if loss:
        loss.prepare(context)
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for number, block in zip(range(300), source.blocks("train", size=512, seed=0), strict=False):
        code = sae.encode(block.x)
        step = Step(block.x, block.x, code, sae.reconstruct(block.x, code), sae, number=number)
        value = step.error.square().mean() + (0.0 if architecture == "topk" else 1e-3) * code.sum().mean()
        if loss:
            batch = source.sequences("train", 16, 0, number)
            step.sequences = dataclasses.replace(batch, code=sae.encode(batch.x[batch.mask]))
            value = value + 0.2 * loss(step)
        optimiser.zero_grad()
        value.backward()
        sae.constrain_gradients()
        optimiser.step()
        sae.constrain_weights()
    return context


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
def test_three_planted_concepts_are_found_from_a_dead_start(architecture: str, tmp_path) -> None:
    source = source_of()
    found = {}
    for name, loss in (("with", Concept()), ("without", None)):
        context = trained(source, loss, architecture, tmp_path)
        metric = ConceptAUROC()
        metric.prepare(context)
        found[name] = {key: value_of(value) for key, value in metric.measure(context).items()}
    for i in CONCEPTS:
        assert found["with"][f"concept_auroc_tokens_feature_{i}"] >= 0.95
        assert found["with"][f"concept_auroc_sequences_feature_{i}"] >= 0.95
        assert found["without"][f"concept_auroc_tokens_feature_{i}"] <= 0.6  # the control: reconstruction alone
