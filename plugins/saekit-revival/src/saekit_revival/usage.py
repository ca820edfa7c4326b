"""How often each latent fires, on a running average."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningUsage:
    """The share of rows in which each latent fires: an exponential moving average over steps.

    memory: how much of the average stays from step to step. The average starts at zero and is corrected for it (as in Adam), so
    after one step it is that step's share.
    """

    def __init__(self, memory: float) -> None:
        self.memory = memory
        self.average: Tensor | None = None  # [d_sae], biased towards 0 in the first steps
        self.steps: Tensor | None = None  # [d_sae], number of steps in each latent's average

    @torch.no_grad()
    def update(self, share: Tensor) -> None:
        """Take in the share of a step's rows in which each latent fired: [d_sae]."""
        if self.average is None or self.steps is None:
            self.average, self.steps = torch.zeros_like(share), torch.zeros_like(share)
        self.average = torch.lerp(share, self.average.to(share), self.memory)  # a checkpoint restores it on the CPU
        self.steps = self.steps.to(share) + 1

    def value(self) -> Tensor:
        """The average: [d_sae]."""
        assert self.average is not None
        assert self.steps is not None
        return self.average / (1 - self.memory**self.steps).clamp_min(1e-12)

    def restart(self, latents: Tensor) -> None:
        """Forget what these latents [n] did so far."""
        for tensor in (self.average, self.steps):
            assert tensor is not None
            tensor[latents] = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {} if self.average is None or self.steps is None else {"usage": self.average, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.average, self.steps = state.get("usage"), state.get("steps")
