"""What is done to the selected latents: ablation, static clamps, and clamps in units of a latent's own RMS."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from saekit_unlearning.edits import Ablate, Clamp, Operation


def operations(
    *, ablate: bool, clamps: Sequence[float], rms_clamps: Sequence[float], rms: Tensor
) -> dict[str, Operation]:
    """The operations by their names.

    clamps: in units of the activations. rms_clamps: in units of `rms` [d_sae]."""
    found: dict[str, Operation] = {"ablated": Ablate()} if ablate else {}
    found |= {f"clamped to -{value:g}": Clamp(value) for value in clamps}
    return found | {f"clamped to -{value:g} RMS": Clamp(value, rms) for value in rms_clamps}
