"""The callback `resample` (Bricken et al. 2023, Towards Monosemanticity, appendix "Neuron resampling")."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from saekit import OptionError, Result, Training, hookimpl
from saekit_revival.followed import Followed
from saekit_revival.renewal import renew
from saekit_revival.usage import RunningUsage


class Resample:
    """Every `every` steps, or after the steps in `at`, gives new weights to latents that hardly fire, made from inputs that are
    rebuilt badly.

    A latent is dead if its running usage (an exponential moving average of the share of rows in which it fires) is less than
    `below`. Inputs are drawn from the step's batch without replacement, with probability proportional to their squared
    reconstruction error, so at most as many latents are resampled at once as the batch has rows.

    The run's analysis of this callback says how many of them are alive `after` steps later, beside as many living latents that
    were left alone, and with `control` beside living ones that got new weights as well.
    """

    def __init__(
        self,
        *,
        every: Annotated[int | None, Field(gt=0, description="Steps between resamplings; 1,000 unless `at` is given.")] = None,
        at: Annotated[
            list[Annotated[int, Field(gt=0)]], Field(description="Resample after these numbers of steps, in place of `every`.")
        ] = [],  # noqa: B006
        until: Annotated[float, Field(gt=0, le=1, description="With `every`: not after this share of the run.")] = 0.8,
        below: Annotated[float, Field(gt=0, lt=1, description="Running usage below which a latent is dead.")] = 1e-5,
        memory: Annotated[
            float, Field(ge=0, lt=1, description="How much of the running usage is kept from step to step.")
        ] = 0.99,
        encoder_scale: Annotated[
            float, Field(gt=0, description="Norm of a new encoder, relative to the mean of the latents that are alive.")
        ] = 0.2,
        after: Annotated[int, Field(gt=0, description="Steps after which it is asked whether a resampled latent is alive.")] = 1000,
        control: Annotated[
            int, Field(ge=0, description="Living latents that get new weights at most beside the dead; this harms them.")
        ] = 0,
    ) -> None:
        if at and every is not None:
            raise OptionError("at", "names the steps, and `every` would name others. Leave one of the two out.")
        if at != sorted(set(at)):
            raise OptionError("at", f"{at} must rise from each step to the next.")
        self.every, self.at, self.until, self.below = every or 1000, at, until, below
        self.encoder_scale = encoder_scale
        self.usage = RunningUsage(memory)
        self.followed = Followed(after, control)

    @property
    def resampled(self) -> int:
        """How many times a latent got new weights because it was dead."""
        return sum(event["revived"] for event in self.followed.events)

    @hookimpl
    def training_started(self, trainer: Training) -> None:
        """Say if a step in `at` never comes."""
        late = [step for step in self.at if step > trainer.total_steps]
        if late:
            trainer.warn(
                f"resample.at: {', '.join(f'{step:,}' for step in late)} will not come, since the run has {trainer.total_steps:,} "
                "steps. Raise training.tokens or leave them out."
            )

    @hookimpl
    def step_ended(self, trainer: Training, number: int) -> None:
        """Update the usage with the step's firings, and resample when it is time."""
        done = number + 1
        self.usage.update(trainer.fired / len(trainer.step.code))  # [d_sae]
        if self.followed.due(done):
            self.followed.look(self._alive(trainer), done)
        if self._is_time(done, trainer.total_steps):
            self.resample(trainer, done)

    def _is_time(self, done: int, total: int) -> bool:
        if self.at:
            return done in self.at
        return done % self.every == 0 and done <= self.until * total

    def _alive(self, trainer: Training) -> Tensor:
        """Which latents are neither dead nor retired: [d_sae]."""
        return (self.usage.value() >= self.below) & ~trainer.firing.retired

    @torch.no_grad()
    def resample(self, trainer: Training, done: int = 0) -> Tensor:
        """Give the dead latents new weights now, after `done` steps. Returns their indices [n]."""
        alive = self._alive(trainer)
        silent = ~alive & ~trainer.firing.retired
        silent[trainer.sae.fixed_latents] = False  # a fixed row has a meaning even while its latent does not fire
        dead = renew(trainer, silent.nonzero().squeeze(1), encoder_scale=self.encoder_scale)  # [n]
        redrawn = self.followed.begin(trainer, dead, alive, done)
        self.usage.restart(torch.cat([dead, redrawn]))
        return dead

    def result(self) -> Result:
        """See `Followed.result`."""
        return self.followed.result()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {**self.usage.state_dict(), **self.followed.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.usage.load_state_dict(state)
        self.followed.load_state_dict(state)
