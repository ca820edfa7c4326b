"""Every step is made in one place, from the activations as the source gives them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import saekit
from saekit import Activations, Step
from saekit.testing import make_step


def test_the_core_makes_a_step_in_one_place() -> None:
    root = Path(saekit.__file__).parent
    made = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Step"
    ]
    assert made == []  # `Step.of` calls `cls`


@pytest.mark.parametrize("transcoder", [False, True])
def test_a_step_is_the_batch_in_the_units_that_the_sae_sees(transcoder: bool) -> None:
    sae = make_step().sae
    x, target, labels = torch.randn(5, sae.d_in), torch.randn(5, sae.d_out), torch.ones(5, 2)
    batch = Activations(x, target if transcoder else None, tokens=torch.arange(5), labels=labels)
    step = Step.of(sae, batch, 2.0, 3.0, number=4, n_dead=1)
    torch.testing.assert_close(step.x, 2.0 * x)
    torch.testing.assert_close(step.target, 3.0 * target if transcoder else 2.0 * x)
    torch.testing.assert_close(step.code.dense(), sae.encode(2.0 * x).dense())
    torch.testing.assert_close(step.reconstruction, sae.decode(step.code))
    assert step.labels is labels and step.tokens is batch.tokens and step.sae is sae
    assert (step.number, step.n_dead, step.dead, step.graph) == (4, 1, None, None)
