"""Both components keep to what saekit asks of their kinds, and have the values that their formulas give."""

import pytest
import torch
from saekit_hoyer.loss import hoyer
from saekit_hoyer.metric import HoyerSparsity

from saekit.testing import conformance, make_step

test_loss = conformance("loss", "hoyer")
test_metric = conformance("metric", "hoyer_sparsity")


def test_values_are_those_of_the_formulas() -> None:
    step = make_step(dtype=torch.float64)
    dense = step.code.dense()  # [batch, d_sae]
    l1, l2, root = dense.norm(p=1, dim=1), dense.norm(dim=1), dense.shape[1] ** 0.5
    torch.testing.assert_close(hoyer(step), (l1 / l2).square().mean())
    metric = HoyerSparsity()
    metric.update(step)
    assert metric.compute() == {"hoyer_sparsity": pytest.approx(float(((root - l1 / l2) / (root - 1)).mean()))}


def test_an_empty_code_costs_nothing_and_has_no_sparsity() -> None:
    step = make_step(options={"k": 4})
    step.code.values = torch.zeros_like(step.code.values)
    metric = HoyerSparsity()
    metric.update(step)
    assert float(hoyer(step)) == 0.0
    assert metric.compute() == {"hoyer_sparsity": None}
