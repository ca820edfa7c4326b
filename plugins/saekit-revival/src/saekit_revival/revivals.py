"""The callback `revivals`: which latents come back from the dead, by whatever means, and whether they stay."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from saekit import Result, Training, hookimpl
from saekit_revival.followed import Followed


class Revivals:
    """Counts latents that were dead and are so no longer, and asks `after` steps later whether they are alive.

    Dead is what `training.dead_after` says. A latent comes back when it fires, or when a callback has given it new weights, so
    losses and callbacks that revive are measured alike. With `control`, living latents get new weights at the same times.
    """

    def __init__(
        self,
        *,
        every: Annotated[int, Field(gt=0, description="Steps between two looks.")] = 100,
        after: Annotated[int, Field(gt=0, description="Steps after which it is asked whether a revived latent is alive.")] = 1000,
        control: Annotated[
            int, Field(ge=0, description="Living latents that get new weights at most beside the revived; this harms them.")
        ] = 0,
    ) -> None:
        self.every = every
        self.followed = Followed(after, control)
        self.was_dead: Tensor | None = None  # [d_sae], at the last look

    @hookimpl
    def step_ended(self, trainer: Training, number: int) -> None:
        """Look when it is time."""
        done, firing = number + 1, trainer.firing
        if self.followed.due(done):
            self.followed.look(self._alive(trainer), done)
        if done % self.every == 0:
            self._look(trainer, done)
            self.was_dead = firing.dead.clone()

    @torch.no_grad()
    def _look(self, trainer: Training, done: int) -> None:
        if self.was_dead is not None:
            alive = self._alive(trainer)
            revived = (self.was_dead.to(alive.device) & alive).nonzero().squeeze(1)  # [n]
            self.followed.begin(trainer, revived, alive, done)

    @staticmethod
    def _alive(trainer: Training) -> Tensor:
        """Which latents are neither dead nor retired: [d_sae]."""
        return ~(trainer.firing.dead | trainer.firing.retired)

    def result(self) -> Result:
        """See `Followed.result`."""
        return self.followed.result()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        state = self.followed.state_dict()
        return state if self.was_dead is None else {**state, "was_dead": self.was_dead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.followed.load_state_dict(state)
        self.was_dead = state.get("was_dead")
