"""The metric `linear_map`: a transcoder against the best linear map between its two sites."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from saekit.activations.batch import Activations
from saekit.builtin.metrics import Summed, deviation
from saekit.runner.context import RunContext
from saekit.training.loss_input import Step

_MOST = 200_000  # activations that the fit takes by default
_FEW = 10  # with fewer activations per coefficient the comparison is not fair
# Relative to the largest variance of a direction: anything less is the rounding of float32.
_ROUNDING = 1e-12


class LinearMap(Summed):
    """The least-squares affine map from what is read to what is rebuilt, as a control for transcoders.

    It is fitted by normal equations, in float64 and in one pass, to the activations that training began with, and
    measured on the same held-out activations as the transcoder. If two sites differ by little more than a linear
    map, explained variance alone says nothing about the latents.
    """

    headline: ClassVar[tuple[str, ...]] = ("linear_explained_variance",)
    meanings: ClassVar[dict[str, str]] = {
        "linear_explained_variance": "share of the target's variance that the best linear map of the input keeps",
        "beyond_linear": "share that the transcoder rebuilds of what the linear map misses; below 0 the map is better",
    }
    undefined: ClassVar[dict[str, str]] = {
        "linear_explained_variance": "the target does not vary at all",
        "beyond_linear": "the linear map misses nothing",
    }
    error: Tensor
    linear_error: Tensor
    square: Tensor
    total: Tensor
    rows: Tensor

    def __init__(
        self,
        *,
        tokens: Annotated[
            int | None,
            Field(gt=1, description="Training activations to fit to; those of the run, 200,000 at most, by default."),
        ] = None,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.sums(error=0, linear_error=0, square=0, total=0, rows=0)

    def prepare(self, context: RunContext) -> None:
        """Fit the map to the first `tokens` training activations."""
        fit = NormalEquations()
        for batch in context.training_activations(self.tokens or min(context.config.training.tokens or _MOST, _MOST)):
            fit.add(batch)
        if fit.rows < _FEW * context.source.d_in:
            context.warn(
                f"The linear map was fitted to {fit.rows} activations of width {context.source.d_in}, which are too few for "
                "a fair comparison. Raise metric.linear_map.tokens."
            )
        self._map, self._bias = fit.solve()

    def update(self, step: Step) -> None:
        """Take in one batch."""
        x, target = _exact(step.x), _exact(step.target)
        linear = x @ self._map + self._bias  # [batch, d_out]
        self.add(
            error=_exact(step.error).square().sum(),
            linear_error=(target - linear).square().sum(),
            square=target.square().sum(),
            total=target.sum(0),  # [d_out]
            rows=len(target),
        )

    def compute(self) -> dict[str, float | None]:
        """linear_explained_variance, None if the target does not vary; beyond_linear, None if the map misses nothing."""
        spread = deviation(self.square, self.total, self.rows)
        missed = float(self.linear_error)
        return {
            "linear_explained_variance": 1.0 - missed / spread if spread > 0 else None,
            "beyond_linear": 1.0 - float(self.error) / missed if missed > _ROUNDING * spread else None,
        }


class NormalEquations:
    """Least squares of the target on x with an intercept, from sums that are added up batch by batch.

    rows: how many activations have been added.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, batch: Activations) -> None:
        """Take in x [n, d_in] and the target [n, d_out] (x again if there is none)."""
        x, target = _exact(batch.x), _exact(batch.x if batch.target is None else batch.target)
        self.rows += len(x)
        new = {"x": x.sum(0), "y": target.sum(0), "xx": x.T @ x, "xy": x.T @ target}
        self._sums = {name: value + self._sums[name] if self._sums else value for name, value in new.items()}

    def solve(self) -> tuple[Tensor, Tensor]:
        """(map [d_in, d_out], bias [d_out]) in float64: the smallest of the maps that fit best."""
        mean_x, mean_y = self._sums["x"] / self.rows, self._sums["y"] / self.rows
        among = self._sums["xx"] / self.rows - torch.outer(mean_x, mean_x)  # [d_in, d_in]
        across = self._sums["xy"] / self.rows - torch.outer(mean_x, mean_y)  # [d_in, d_out]
        variances, directions = torch.linalg.eigh(among)
        # Some directions may not vary: the output of a LayerNorm does not along the inverse of its weights.
        varies = variances > _ROUNDING * variances[-1].clamp_min(0.0)
        directions = directions[:, varies]
        fitted = directions @ ((directions.T @ across) / variances[varies, None])
        return fitted, mean_y - mean_x @ fitted


def _exact(tensor: Tensor) -> Tensor:
    """In float64, which Apple's GPUs lack."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
