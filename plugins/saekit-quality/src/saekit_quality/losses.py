"""What the model is trained for: BCE of each criterion, and a contrastive loss over pairs of responses."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from saekit_contrastive.tiled import Pairs, weighted_contrastive_loss
from torch import Tensor

_COMPARED = 1 << 17  # pairs at a time: a large batch, encoded in chunks, should not need more memory for its pairs than for these


class QualityLoss(NamedTuple):
    """The loss of a batch, and its two parts before they are weighed."""

    loss: Tensor
    bce: Tensor
    contrastive: Tensor  # 0 for a batch without a pair


def bce(logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, averaged over the targets that are there, as a scalar; zero if there is none.

    logits: [n, criteria].
    targets: [n, criteria] from 0 to 1, hard or soft; NaN where there are no votes.
    pos_weight: [criteria], how much more a "yes" weighs than a "no".
    """
    known = ~targets.isnan()
    each = F.binary_cross_entropy_with_logits(
        logits.float(), targets.nan_to_num(0.0).float(), pos_weight=pos_weight, reduction="none"
    )
    return (each * known).sum() / known.sum().clamp_min(1)


def quality_loss(
    logits: Tensor,
    embedding: Tensor,
    targets: Tensor,
    pairs: Pairs,
    *,
    lambda_contrastive: float,
    temperature: float,
    pos_weight: Tensor | None = None,
) -> QualityLoss:
    """BCE + lambda * InfoNCE over weighted pairs.

    logits, targets: [n, criteria], see `bce`.
    embedding: [n, projection_dim] of norm 1.
    """
    classified = bce(logits, targets, pos_weight)
    tile = max(1, _COMPARED // max(1, len(embedding)))
    contrastive = weighted_contrastive_loss(embedding, pairs, temperature=temperature, tile=tile)
    return QualityLoss(classified + lambda_contrastive * contrastive, classified.detach(), contrastive.detach())
