"""Directions in the activations that predict a concept: the yardsticks for a latent that should stand for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

_PENALTY, _ITERATIONS = 1e-3, 200


def difference_of_means(x: Tensor, labels: Tensor) -> Tensor:
    """The mean of class 1 minus that of class 0: [d], for x [n, d] and labels [n] of both classes, without NaN."""
    positive = labels > 0.5
    return x[positive].mean(0) - x[~positive].mean(0)


def logistic(x: Tensor, labels: Tensor) -> Tensor:
    """The weights [d] of a logistic regression of labels [n] on x [n, d]; each class weighs one half.

    Coordinates are standardised, 0.5e-3 |w|^2 is added to the mean loss, and L-BFGS runs to convergence, for at most 200
    iterations.
    """
    with torch.enable_grad():
        x = x.detach().float()
        centre, spread = x.mean(0), x.std(0).clamp_min(1e-8)
        y = (labels > 0.5).float()
        sign, weight = 2 * y - 1, torch.where(y > 0, 0.5 / y.sum(), 0.5 / (1 - y).sum())  # [n] each
        w = torch.zeros(x.shape[1], device=x.device, requires_grad=True)
        b = torch.zeros((), device=x.device, requires_grad=True)
        search = torch.optim.LBFGS([w, b], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            search.zero_grad()
            scaled = w / spread
            logits = x @ scaled - centre @ scaled + b
            loss = (weight * softplus(-sign * logits)).sum() + 0.5 * _PENALTY * w.square().sum()
            loss.backward()
            return loss

        search.step(closure)
    return (w / spread).detach()
