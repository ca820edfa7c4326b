"""The loss `usage_kl`: latents should fire at a target rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from saekit import OptionError, RunContext, Step
from saekit_revival.usage import RunningUsage

CLOSE = 0.05
"""A target within this share of the rate that a gate fixes is taken to be that rate."""


def kl(target: float, rate: Tensor, floor: float) -> Tensor:
    """KL(target || rate) of two Bernoulli variables, both mixed with a share of `floor` of each outcome: [n] -> [n].

    With p' = floor + (1 - 2 floor) p it is t' log(t' / r') + (1 - t') log((1 - t') / (1 - r')): zero at rate = target, and finite
    at 0 and at 1."""
    t, r = floor + (1 - 2 * floor) * target, floor + (1 - 2 * floor) * rate
    return t * (t / r).log() + (1 - t) * ((1 - t) / (1 - r)).log()


def kl_slope(target: float, rate: Tensor, floor: float) -> Tensor:
    """The derivative of `kl` by the rate, (1 - 2 floor) (r' - t') / (r' (1 - r')): [n] -> [n]."""
    t, r = floor + (1 - 2 * floor) * target, floor + (1 - 2 * floor) * rate
    return (1 - 2 * floor) * (r - t) / (r * (1 - r))


class UsageKL:
    """KL divergence of each latent's rate of firing from a target rate, summed over the latents.

    The rate is a running average. Whether a latent fires is a step function of its margin m, the distance of its pre-activation
    from the threshold. In its place the gradient has a window: d rate / d m = 1 / (width * batch) where |m| < width / 2, and 0
    elsewhere. So a latent that comes nowhere near its threshold learns nothing from this; the measure `reached` says how many do.

    In a step only some `latents` get a gradient, drawn without replacement with probability proportional to the slope of their
    divergence, so mostly dead and overused ones: what is computed is their margins, [batch, latents], and never
    [batch, d_sae]. The gradient of a running average would be smaller by 1 - memory; that factor is left out, so that a weight
    means the same with every memory.
    """

    def __init__(
        self,
        *,
        target: Annotated[float, Field(gt=0, lt=1, description="The share of rows in which each latent should fire.")] = 0.05,
        width: Annotated[
            float, Field(gt=0, description="Width of the window about the threshold, in units of pre-activations.")
        ] = 2.0,
        memory: Annotated[
            float, Field(ge=0, lt=1, description="How much of the running rate is kept from step to step.")
        ] = 0.99,
        latents: Annotated[
            int | None, Field(gt=0, description="Latents that get a gradient in a step; a thirty-second of them by default.")
        ] = None,
        floor: Annotated[
            float, Field(gt=0, lt=0.5, description="Bounds the loss: rates are taken to be at least so far from 0 and from 1.")
        ] = 1e-3,
    ) -> None:
        if floor >= min(target, 1 - target):
            raise OptionError("floor", f"{floor:g} is not below the target {target:g} and 1 - target. Lower it, to 1e-3 say.")
        self.target, self.width, self.latents, self.floor = target, width, latents, floor
        self.usage = RunningUsage(memory)
        self._reached: Tensor | None = None
        self._warn: Callable[[str], None] | None = None
        self._fixed: float | None = None

    def prepare(self, context: RunContext) -> None:
        """Warn if the gate fixes the mean rate at another value than the target."""
        sae, self._warn = context.sae, context.warn
        if sae.l0_option is None:
            return
        active = getattr(sae, sae.l0_option)
        self._fixed = active / sae.d_sae
        if abs(self.target / self._fixed - 1) > CLOSE:
            context.warn(
                f"usage_kl: the gate fixes the mean rate at {sae.l0_option} / d_sae = {active} / {sae.d_sae} = {self._fixed:.3g}, "
                f"so the latents cannot all fire at the target {self.target:g}. Set its target to {self._fixed:.3g}."
            )

    def __call__(self, step: Step) -> Tensor:
        """The divergence at the running rates, with the gradient of the chosen latents."""
        code = step.code
        exact = torch.promote_types(step.x.dtype, torch.float32)
        self.usage.update(code.fired().to(exact) / len(code))
        rate = self.usage.value()  # [d_sae]
        slope = kl_slope(self.target, rate, self.floor)  # [d_sae]
        chosen = self._chosen(slope)  # [n]
        margin = code.margin(chosen).to(exact)  # [batch, n]
        self._reached = (margin.detach().abs() < self.width / 2).any(0)  # [n]
        surrogate = margin.clamp(-self.width / 2, self.width / 2).mean(0) / self.width  # [n], of slope 1 / (width * batch)
        return kl(self.target, rate, self.floor).sum() + slope[chosen] @ (surrogate - surrogate.detach())

    def _chosen(self, slope: Tensor) -> Tensor:
        """The latents [n] that get a gradient."""
        d_sae = len(slope)
        n = min(self.latents or max(1, d_sae // 32), d_sae)
        if n == d_sae:
            return torch.arange(d_sae, device=slope.device)
        chances = slope.abs() / torch.empty_like(slope).exponential_()  # the n largest: draws without replacement
        return chances.topk(n, sorted=False).indices

    @torch.no_grad()
    def measures(self, step: Step) -> dict[str, Tensor]:
        """The mean rate, and of the latents chosen in the step the share that came into the window at all."""
        if self._reached is None:  # resumed, with no step done yet
            return {}
        mean = self.usage.value().mean()
        if self._warn and self._fixed is None and step.fraction >= 0.25 and float(mean) < self.target / 2:
            d_sae = step.code.d_sae
            self._warn(
                f"usage_kl: a target of {self.target:g} asks for {self.target * d_sae:.3g} active latents in a row, but a quarter "
                "of the run is over and fewer than half as many are: the penalty on the code (l1, say) pulls the other way. Lower "
                "the target to the rate you want, L0 / d_sae, or that penalty."
            )
        return {"mean_rate": mean, "reached": self._reached.float().mean()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self.usage.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.usage.load_state_dict(state)
