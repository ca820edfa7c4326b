"""The k largest of each row against torch's, whichever way they are found."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.sae.kernels import row_topk


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 700), k=st.integers(1, 40), ties=st.booleans(), seed=st.integers(0, 99)
)
def test_finds_what_topk_finds(rows: int, columns: int, k: int, ties: bool, seed: int) -> None:
    k = min(k, columns)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if ties:
        values = (2 * values).round()
    found, indices = row_topk(values, k)
    assert torch.equal(found.sort(1, descending=True).values, values.topk(k, dim=1).values)
    assert torch.equal(values.gather(1, indices), found)
    assert all(len(set(row.tolist())) == k for row in indices)  # no column twice
