"""The callback `resample` (Bricken et al. 2023, Towards Monosemanticity, appendix "Neuron resampling")."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from saekit import SparseAutoencoder, Training, hookimpl


class Resample:
    """Every `every` steps, gives latents that have hardly fired new weights, made from inputs rebuilt badly.

    A latent is dead when its running usage (the share of rows in which it fires, an exponential moving average) is
    below `below`. Inputs are drawn from the step's batch with probability proportional to their squared reconstruction
    error, so at most one latent a row is resampled at a time.
    """

    def __init__(
        self,
        *,
        every: Annotated[int, Field(gt=0, description="Steps between resamplings.")] = 1000,
        until: Annotated[float, Field(gt=0, le=1, description="No resampling after this share of the run.")] = 0.8,
        below: Annotated[float, Field(gt=0, lt=1, description="Running usage under which a latent is dead.")] = 1e-5,
        memory: Annotated[
            float, Field(ge=0, lt=1, description="How much of the running usage stays from step to step.")
        ] = 0.99,
        encoder_scale: Annotated[
            float, Field(gt=0, description="New encoders' norm, in units of the living latents' mean.")
        ] = 0.2,
    ) -> None:
        self.every, self.until, self.below, self.memory = every, until, below, memory
        self.encoder_scale = encoder_scale
        self.usage: Tensor | None = None  # [d_sae], biased towards 0 in the first steps; see `running_usage`
        self.steps: Tensor | None = None  # [d_sae], steps that went into the average of each latent
        self.resampled = 0

    @hookimpl
    def training_started(self, trainer: Training) -> None:
        """What a checkpoint gave back lies on the CPU."""
        if self.usage is not None and self.steps is not None:
            self.usage, self.steps = self.usage.to(trainer.device), self.steps.to(trainer.device)

    @hookimpl
    def step_ended(self, trainer: Training, number: int) -> None:
        """Take in the step's firings, and resample when it is time."""
        share = trainer.fired / len(trainer.step.code)  # [d_sae]
        if self.usage is None or self.steps is None:
            self.usage, self.steps = torch.zeros_like(share), torch.zeros_like(share)
        self.usage = torch.lerp(share, self.usage, self.memory)
        self.steps += 1
        if (number + 1) % self.every == 0 and number + 1 <= self.until * trainer.total_steps:
            self.resample(trainer)

    def running_usage(self) -> Tensor:
        """The moving average without its bias towards the zero it began from (as in Adam): [d_sae]."""
        assert self.usage is not None
        assert self.steps is not None
        return self.usage / (1 - self.memory**self.steps).clamp_min(1e-12)

    @torch.no_grad()
    def resample(self, trainer: Training) -> Tensor:
        """Give the dead latents new weights now; returns their indices."""
        sae, step = trainer.sae, trainer.step
        silent = self.running_usage() < self.below
        silent[sae.fixed_latents] = False  # a row that is not to move has a meaning, also where it is not read yet
        dead = silent.nonzero().squeeze(1)  # [n]
        error = step.error.square().sum(1).cpu()  # [batch]
        drawable = int((error > 0).sum())
        dead = dead[: min(len(dead), drawable)]
        if len(dead) == 0:
            return dead
        rows = torch.multinomial(error.double(), len(dead), replacement=False, generator=trainer.generator)
        rows = rows.to(step.x.device)
        living = torch.ones(sae.d_sae, dtype=torch.bool, device=dead.device)
        living[dead] = False
        norm = sae.W_enc[:, living].norm(dim=0).mean() if bool(living.any()) else sae.W_enc.new_ones(())
        sae.W_enc[:, dead] = self.encoder_scale * norm * normalize(sae.centred(step.x[rows]), dim=1).t()
        rebuilt = normalize(step.target[rows] - sae.skipped(step.x[rows]) - sae.b_dec, dim=1)
        sae.W_dec[dead] = rebuilt * (sae.W_dec[living].norm(dim=1).mean() if bool(living.any()) else 1.0)
        for bias in _biases(sae):
            bias[dead] = 0.0
        self._reset_moments(trainer, dead)
        trainer.firing.revive(dead)
        for average in (self.usage, self.steps):  # their average begins anew
            assert average is not None
            average[dead] = 0.0
        self.resampled += len(dead)
        return dead

    @staticmethod
    def _reset_moments(trainer: Training, dead: Tensor) -> None:
        biases = [(bias, False) for bias in _biases(trainer.sae)]
        for parameter, latents_last in ((trainer.sae.W_enc, True), (trainer.sae.W_dec, False), *biases):
            state = trainer.optimizer.state[parameter]
            for name in state.keys() & {"exp_avg", "exp_avg_sq"}:  # none yet where no loss has reached the parameter
                (state[name].T if latents_last else state[name])[dead] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        state: dict[str, Any] = {"resampled": self.resampled}
        return state if self.usage is None else {**state, "usage": self.usage, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.resampled = state["resampled"]
        self.usage, self.steps = state.get("usage"), state.get("steps")


def _biases(sae: SparseAutoencoder) -> list[Tensor]:
    """What each latent has of its own beside its two directions and begins at zero: b_enc, or a gated SAE's three."""
    named = (getattr(sae, name, None) for name in ("b_enc", "b_gate", "b_mag", "r_mag"))
    return [bias for bias in named if bias is not None]
