"""The loss `ghost` (Jermyn and Templeton 2024, Ghost Grads: an improvement on resampling, Circuits Updates of January 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from saekit import Step

TINY = 1e-12


class Ghost:
    """Dead latents alone, with an exponential in place of their gate, rebuild what the others missed.

    r is the residual [batch, d_out], without a gradient, and g = exp(pre) @ W_dec over the dead latents. Each row of g is scaled to
    half the norm of r's, and the squared error to the value of `mse`; both factors count as constants in the gradient:

        ghost = c * mean((r - a * g)^2),  a = |r| / (2 |g|) for each row,  c = mean(r^2) / mean((r - a * g)^2)

    So its value is always that of `mse`, and only its gradient means something. It is skipped while no latent is dead. Its matrix
    is [batch, dead latents].
    """

    def active(self, step: Step) -> bool:
        """Whether any latent is dead."""
        return step.dead is not None and step.n_dead > 0

    def __call__(self, step: Step) -> Tensor:
        assert step.dead is not None  # see `active`
        dead = step.dead.int().topk(step.n_dead).indices  # [n], which asks the device nothing, unlike nonzero()
        residual = step.error.detach()  # [batch, d_out]
        pre = step.code.pre(dead)  # [batch, n]
        # Subtracting a row's largest changes only a, and keeps exp from overflowing.
        ghosts = torch.exp(pre - pre.detach().amax(1, keepdim=True)) @ step.sae.W_dec[dead]  # [batch, d_out]
        with torch.no_grad():
            a = residual.norm(dim=1, keepdim=True) / (2 * ghosts.norm(dim=1, keepdim=True)).clamp_min(TINY)  # [batch, 1]
        missed = (residual - a * ghosts).square().mean()
        return missed * (residual.square().mean() / missed.detach().clamp_min(TINY))
