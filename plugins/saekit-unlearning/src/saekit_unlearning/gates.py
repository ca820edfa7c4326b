"""Gates on chosen latents, fitted after training with model and dictionary frozen.

    minimise over g = sigmoid(theta):  mean forget_kl + weight * mean retain_kl + l1 * sum_j |1 - g_j| / n

The edited model is that of `LatentEdit` with `Gates(g)`, on either path. The L1 term draws every gate towards 1, open, so that only
those close that forgetting needs closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saekit import SparseAutoencoder
from saekit_unlearning.data import Text
from saekit_unlearning.edits import Gates, LatentEdit, Path
from saekit_unlearning.kl import forget_kl, retain_kl
from saekit_unlearning.passages import Site
from saekit_unlearning.places import batches, placed

OPEN = 3.0  # theta at the start: a gate of 0.95


@dataclass(frozen=True)
class FittedGates:
    """gates: [n], one for each of `latents`. forget: the divergence on forget text at every step."""

    latents: Tensor
    gates: Tensor
    forget: np.ndarray

    def closed(self, below: float = 0.5) -> Tensor:
        """The latents whose gate is below a half: [m]."""
        return self.latents[self.gates < below]


def fit_gates(
    site: Site,
    sae: SparseAutoencoder,
    latents: Tensor,
    path: Path,
    forget: Sequence[Text],
    retain: Sequence[Sequence[int]],
    *,
    steps: int = 100,
    lr: float = 0.1,
    l1: float = 1.0,
    weight: float = 1.0,
    batch: int = 32,
    seed: int = 0,
) -> FittedGates:
    """The gates of `latents` [n]. retain: rows of tokens. batch: texts, and rows of tokens, in one step."""
    draws = np.random.default_rng(seed)
    texts = [placed(site.subject.tokenizer, text) for text in forget]
    ready = batches(site, sorted(texts, key=lambda text: len(text.tokens)), batch)
    rows = [retain[i] for i in draws.permutation(len(retain))]
    kept = [p for start in range(0, len(rows), batch) for p in site.passages(rows[start : start + batch], 1 << 30)]
    theta = torch.full((len(latents),), OPEN, device=site.subject.device, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=lr)
    losses = torch.zeros(steps, device=theta.device)
    for step in range(steps):
        one = ready[draws.integers(len(ready))]
        edit = LatentEdit(sae, latents, Gates(theta.sigmoid()), path)
        value = forget_kl(site.logits(one.passages, edit)[one.predicting].float()).mean()
        losses[step] = value.detach()
        loss = value + l1 * (1 - theta.sigmoid()).mean()
        if kept:
            passages = kept[draws.integers(len(kept))]
            with torch.no_grad():
                base = site.logits(passages)[passages.mask].float()
            loss = loss + weight * retain_kl(base, site.logits(passages, edit)[passages.mask].float()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return FittedGates(latents, theta.detach().sigmoid(), losses.cpu().numpy())
