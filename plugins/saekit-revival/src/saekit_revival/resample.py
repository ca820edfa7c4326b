"""The callback `resample` (Bricken et al. 2023, Towards Monosemanticity, appendix "Neuron resampling")."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from saekit import Training, hookimpl
from saekit_revival.renewal import renew


class Resample:
    """Every `every` steps, gives new weights to latents that hardly fire, made from inputs that are rebuilt badly.

    A latent is dead if its running usage (an exponential moving average of the share of rows in which it fires) is less than
    `below`. Inputs are drawn from the step's batch without replacement, with probability proportional to their squared
    reconstruction error, so at most as many latents are resampled at once as the batch has rows.
    """

    def __init__(
        self,
        *,
        every: Annotated[int, Field(gt=0, description="Steps between resamplings.")] = 1000,
        until: Annotated[float, Field(gt=0, le=1, description="No resampling after this share of the run.")] = 0.8,
        below: Annotated[float, Field(gt=0, lt=1, description="Running usage below which a latent is dead.")] = 1e-5,
        memory: Annotated[
            float, Field(ge=0, lt=1, description="How much of the running usage is kept from step to step.")
        ] = 0.99,
        encoder_scale: Annotated[
            float, Field(gt=0, description="Norm of a new encoder, relative to the mean of the latents that are alive.")
        ] = 0.2,
    ) -> None:
        self.every, self.until, self.below, self.memory = every, until, below, memory
        self.encoder_scale = encoder_scale
        self.usage: Tensor | None = None  # [d_sae], biased towards 0 in the first steps; see `running_usage`
        self.steps: Tensor | None = None  # [d_sae], number of steps in each latent's average
        self.resampled = 0

    @hookimpl
    def training_started(self, trainer: Training) -> None:
        """Move to the device what a checkpoint has restored on the CPU."""
        if self.usage is not None and self.steps is not None:
            self.usage, self.steps = self.usage.to(trainer.device), self.steps.to(trainer.device)

    @hookimpl
    def step_ended(self, trainer: Training, number: int) -> None:
        """Update the usage with the step's firings, and resample when it is time."""
        share = trainer.fired / len(trainer.step.code)  # [d_sae]
        if self.usage is None or self.steps is None:
            self.usage, self.steps = torch.zeros_like(share), torch.zeros_like(share)
        self.usage = torch.lerp(share, self.usage, self.memory)
        self.steps += 1
        if (number + 1) % self.every == 0 and number + 1 <= self.until * trainer.total_steps:
            self.resample(trainer)

    def running_usage(self) -> Tensor:
        """The moving average [d_sae], corrected for having started at zero (as in Adam)."""
        assert self.usage is not None
        assert self.steps is not None
        return self.usage / (1 - self.memory**self.steps).clamp_min(1e-12)

    @torch.no_grad()
    def resample(self, trainer: Training) -> Tensor:
        """Give the dead latents new weights now. Returns their indices [n]."""
        silent = (self.running_usage() < self.below) & ~trainer.firing.retired
        silent[trainer.sae.fixed_latents] = False  # a fixed row has a meaning even while its latent does not fire
        dead = renew(trainer, silent.nonzero().squeeze(1), encoder_scale=self.encoder_scale)  # [n]
        for average in (self.usage, self.steps):  # their averages start again
            assert average is not None
            average[dead] = 0.0
        self.resampled += len(dead)
        return dead

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        state: dict[str, Any] = {"resampled": self.resampled}
        return state if self.usage is None else {**state, "usage": self.usage, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.resampled = state["resampled"]
        self.usage, self.steps = state.get("usage"), state.get("steps")
