"""The loss `hoyer`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from saekit import Step


def hoyer(
    step: Step,
    *,
    eps: Annotated[float, Field(gt=0, description="Added to the squared norm, so that an empty code costs nothing.")] = 1e-8,
) -> Tensor:
    """(sum a)^2 / sum a^2 of each row's code, averaged over the batch (the Hoyer-square of Yang, Wen and Li, 2020).

    1 where a single latent is active, n where n are, all alike. It does not change when all activations are scaled, so
    unlike an L1 norm it does not make them smaller.
    """
    code = step.code
    return (code.sum() ** 2 / (code.square_sum() + eps)).mean()  # [batch] -> scalar
