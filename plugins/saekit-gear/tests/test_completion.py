"""The model takes sets: neither order nor padding matters; its loss is the formula."""

import pytest
import torch
from saekit_gear.completion import POOLED, SetCompletionModel, completion_loss
from saekit_gear.sets import ITEMS, generate


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SetCompletionModel(width=16, layers=1, heads=2).double().eval()


def test_neither_order_nor_padding_matters(model):
    items, mask, _ = generate(32, (1,))
    order = torch.rand(items.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    wide = torch.cat([torch.zeros(32, 3, dtype=torch.long), items.gather(1, order)], 1)
    pooled = []
    model.pool.register_forward_hook(lambda module, args, out: pooled.append(out))
    torch.testing.assert_close(model(items, mask), model(wide, wide > 0))
    assert pooled[0].shape == (32, POOLED)
    torch.testing.assert_close(pooled[0], pooled[1])


def test_the_loss_is_the_cross_entropy_of_what_was_taken_out(model):
    items, mask, _ = generate(8, (2,))
    missing = torch.zeros_like(mask)
    missing[:, 0] = missing[::2, 3] = True
    terms = []
    for row in range(8):
        left = items[row][mask[row] & ~missing[row]]
        logits = model(left[None], torch.ones(1, len(left), dtype=torch.bool))[0]
        others = torch.tensor([item + 1 not in left.tolist() for item in range(len(ITEMS))])
        for item in items[row][missing[row]]:
            terms.append(-(logits[item - 1] - logits[others].logsumexp(0)))
    torch.testing.assert_close(completion_loss(model, items, mask, missing), torch.stack(terms).mean())
