"""A small head on frozen features, trained by BCE with or without a contrastive loss: what the experiment compares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from saekit import seeded
from saekit_quality.losses import bce, quality_loss
from saekit_quality.metrics import macro_auroc
from saekit_quality.pairs import Rule, VotePairs
from saekit_quality.votes import Floats, Targets, hard_targets, soft_targets, targets_of


@dataclass(frozen=True)
class HeadSettings:
    """How heads are trained. What is not the contrastive loss is the same in every arm."""

    hidden: int = 128
    projection: int = 64
    dropout: float = 0.1
    temperature: float = 0.07
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch: int = 32
    steps: int = 300
    check_every: int = 25
    """Steps between looks at the validation responses; the head of the best look is kept."""
    warm_up: float = 0.1
    """The share of the steps in which the contrastive loss's weight grows from 0."""


class Head(nn.Module):
    """A hidden layer on features, which a classifier and a projection share; only through it does one help the other."""

    def __init__(self, d: int, criteria: int, settings: HeadSettings) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(d, settings.hidden), nn.GELU(), nn.Dropout(settings.dropout))
        self.classifier = nn.Linear(settings.hidden, criteria)
        self.projection = nn.Linear(settings.hidden, settings.projection)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [b, d] to logits [b, C] and projections [b, p] of norm 1."""
        hidden = self.shared(features)
        return self.classifier(hidden), functional.normalize(self.projection(hidden), dim=1)


@dataclass(frozen=True)
class Trained:
    """A head with the step that was kept, and its macro AUROC on validation responses, by which it was."""

    head: Head
    step: int
    validation: float

    def __call__(self, features: Floats) -> tuple[Floats, Floats]:
        """Logits [n, C] and projections [n, p]."""
        self.head.eval()
        with torch.no_grad():
            logits, z = self.head(torch.as_tensor(features))
        return logits.numpy().astype(np.float64), z.numpy()


def train_head(
    features: Floats,
    votes: Floats,
    validation: tuple[Floats, Floats],
    *,
    targets: Targets,
    weight: float = 0.0,
    pairs: Rule = "majority",
    shuffled: bool = False,
    seed: int = 0,
    settings: HeadSettings | None = None,
) -> Trained:
    """Train by `quality_loss`: BCE against the targets of the votes, plus `weight` times the contrastive loss over `pairs`.

    features: [n, d] float32; votes: [n, A, C]; validation: another pair of these. shuffled: the contrastive loss is given the
    votes of other responses of the batch, so that its pairs mean nothing. Equal seeds give equal first weights, batches in the same
    order and the same dropout, whatever the losses.
    """
    settings = settings or HeadSettings()
    x = torch.as_tensor(features)
    goal, share = (torch.as_tensor(values).float() for values in (targets_of(votes, targets), soft_targets(votes)))  # [n, C]
    order, shuffling = (torch.Generator().manual_seed(seed * 2 + part) for part in (0, 1))
    seen_x, seen_labels = validation[0], hard_targets(validation[1])
    best: tuple[float, int, dict[str, Tensor]] | None = None
    with seeded(seed, torch.device("cpu")):
        head = Head(x.shape[1], goal.shape[1], settings)
        optimiser = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        queue = torch.empty(0, dtype=torch.long)
        for step in range(1, settings.steps + 1):
            if len(queue) < min(settings.batch, len(x)):
                queue = torch.randperm(len(x), generator=order)
            rows, queue = queue[: settings.batch], queue[settings.batch :]
            head.train()
            logits, z = head(x[rows])
            judged = share[rows]
            if shuffled:
                judged = judged[torch.randperm(len(rows), generator=shuffling)]
            grown = weight * min(1.0, step / max(1.0, settings.warm_up * settings.steps))
            if grown:
                alike = VotePairs(judged, pairs)
                loss = quality_loss(logits, z, goal[rows], alike, lambda_contrastive=grown, temperature=settings.temperature).loss
            else:
                loss = bce(logits, goal[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if step % settings.check_every == 0 or step == settings.steps:
                found = macro_auroc(_probabilities(head, seen_x), seen_labels) or 0.0
                if best is None or found > best[0]:
                    best = found, step, {name: value.clone() for name, value in head.state_dict().items()}
    assert best is not None  # the last step is always looked at
    head.load_state_dict(best[2])
    return Trained(head, best[1], best[0])


def _probabilities(head: Head, features: Floats) -> Floats:
    head.eval()
    with torch.no_grad():
        return torch.sigmoid(head(torch.as_tensor(features))[0]).double().numpy()
