"""`SetCompletionModel`: a small set transformer that says which items are missing from a set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saekit_gear.sets import ITEMS

POOLED = 512
"""The width of the pooled vector."""


class MaskedMean(nn.Module):
    """The mean over the items that are there. Its output is the hook point `pool`."""

    def forward(self, items: Tensor, mask: Tensor) -> Tensor:
        """items: [n, T, d]. mask: [n, T], True where an item is. Returns [n, d]."""
        weights = mask.to(items)[..., None]
        return (items * weights).sum(1) / weights.sum(1)


class SetCompletionModel(nn.Module):
    """Items attend to one another, whatever their order; what they become is averaged, and read out linearly.

    width, layers, heads: of the transformer. There are no positions, so a set's order does not matter.
    """

    def __init__(self, *, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(ITEMS) + 1, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.mix = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.widen = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, POOLED), nn.GELU())
        self.pool = MaskedMean()
        self.complete = nn.Linear(POOLED, len(ITEMS))

    def forward(self, items: Tensor, mask: Tensor) -> Tensor:
        """items: [n, T] numbers, 0 at padding. mask: [n, T], False there. Returns [n, items] logits of what is missing."""
        mixed = self.mix(self.embed(items), src_key_padding_mask=~mask)
        return self.complete(self.pool(self.widen(mixed), mask))


def completion_loss(model: nn.Module, items: Tensor, mask: Tensor, missing: Tensor) -> Tensor:
    """The mean cross-entropy of each item that was taken out, among the items that are not in the set.

    missing: [n, T], True for what is taken out; every set must keep an item."""
    left = mask & ~missing
    logits = model(torch.where(left, items, 0), left)  # [n, len(ITEMS)]
    seen = torch.zeros(len(items), len(ITEMS) + 1, dtype=torch.bool, device=items.device)
    seen.scatter_(1, torch.where(left, items, 0), True)
    log_shares = logits.masked_fill(seen[:, 1:], -torch.inf).log_softmax(1)
    rows, places = missing.nonzero(as_tuple=True)
    return -log_shares[rows, items[rows, places] - 1].mean()
