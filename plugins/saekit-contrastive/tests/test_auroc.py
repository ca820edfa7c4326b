from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from saekit import auroc, auroc_of_latents


@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), d_sae=st.integers(1, 8), levels=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_every_latent_has_the_auroc_of_its_dense_column(seed: int, n: int, d_sae: int, levels: int) -> None:
    draws = np.random.default_rng(seed)
    dense = torch.from_numpy(draws.integers(-levels, levels + 1, (n, d_sae)).clip(0).astype(np.float32))  # ties abound
    labels = torch.from_numpy(draws.choice([0.0, 1.0, np.nan], n))
    rows, latents = dense.nonzero(as_tuple=True)
    order = torch.from_numpy(draws.permutation(len(rows)))
    rows, latents = rows[order], latents[order]
    found = auroc_of_latents(rows, latents, dense[rows, latents], labels, d_sae)
    known = ~labels.isnan()
    y = labels[known].numpy()
    for j in range(d_sae):
        if len(set(y)) < 2:
            assert found[j].isnan() and auroc(dense[:, j], labels) is None
        else:
            expected = roc_auc_score(y, dense[known, j].numpy())
            assert float(found[j]) == pytest.approx(expected, abs=1e-12)
            assert auroc(dense[:, j], labels) == pytest.approx(expected, abs=1e-12)


def test_scores_that_a_squashing_metric_would_tie_are_told_apart() -> None:
    """torchmetrics' AUROC passes scores outside 0 to 1 through a sigmoid, where 30 and 40 are equal in float32."""
    scores = torch.tensor([30.0, 40.0, 50.0, 60.0])
    assert auroc(scores, torch.tensor([0.0, 0.0, 1.0, 1.0])) == 1.0
    assert auroc(-scores, torch.tensor([0.0, 0.0, 1.0, 1.0])) == 0.0
