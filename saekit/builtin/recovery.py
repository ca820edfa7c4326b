"""The metric `dictionary_recovery`: how much of a known dictionary has been found."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from saekit.builtin.metrics import Summed
from saekit.runner.context import RunContext
from saekit.seeds import derived_seed
from saekit.training.loss_input import Step

_SAME = 0.9  # from this cosine on, a direction counts as found
_PIECE = 512  # rows of one product


class DictionaryRecovery(Summed):
    """How well the true directions are matched by decoder rows, and decoder rows by true directions.

    `recovery` is the mean over the true directions of the largest cosine with a decoder row (the mean max cosine
    similarity of Sharkey et al. 2022), `recovery_reverse` the same the other way round. Cosines are signed, since
    latents are; latents that fired on no held-out activation are left out. The control of each is the same figure for as
    many random directions as there are latents, which is what an untrained dictionary gives.
    """

    headline: ClassVar[tuple[str, ...]] = ("recovery",)
    meanings: ClassVar[dict[str, str]] = {
        "recovery": "cosine of a true direction with the nearest living latent, on average; 1 is perfect",
        "recovery_control": "the same for random directions in the latents' place",
        "recovery_reverse": "cosine of a living latent with the nearest true direction, on average",
        "recovery_reverse_control": "the same for random directions in the latents' place",
        "recovered_fraction": f"share of the true directions that a living latent matches with a cosine of {_SAME} or more",
    }
    undefined: ClassVar[dict[str, str]] = dict.fromkeys(
        ("recovery", "recovery_reverse", "recovered_fraction"), "no latent is active"
    )
    fired: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.sums(fired=0)

    def prepare(self, context: RunContext) -> None:
        """Take the true directions from the source, the decoder from the SAE, and the seed of the control."""
        self._truth = context.source.truth.double().cpu()  # [n_features, d]
        self._decoder = context.sae.W_dec.detach().double().cpu()  # [d_sae, d]
        self._seed = context.seed

    def update(self, step: Step) -> None:
        """Take in one batch: which latents are alive."""
        self.add(fired=step.code.fired())

    def compute(self) -> dict[str, float | None]:
        """recovery, recovery_reverse and recovered_fraction, None if no latent is alive; the controls."""
        generator = torch.Generator().manual_seed(derived_seed("control", self._seed))
        control = torch.randn(self._decoder.shape, generator=generator, dtype=torch.float64)
        found, back = _best(self._truth, self._decoder[self.fired.cpu() > 0])
        found_control, back_control = _best(self._truth, control)
        return {
            "recovery": _mean(found),
            "recovery_control": _mean(found_control),
            "recovery_reverse": _mean(back),
            "recovery_reverse_control": _mean(back_control),
            "recovered_fraction": None if found is None else float((found >= _SAME).double().mean()),
        }


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.mean())


def _best(truth: Tensor, dictionary: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The largest cosine of each true direction, [n], and of each row of the dictionary, [m]; None if m is 0."""
    if not len(dictionary):
        return None, None
    rows = functional.normalize(dictionary, dim=1)
    of_rows = torch.full((len(rows),), -1.0, dtype=torch.float64)
    of_truth = []
    for piece in functional.normalize(truth, dim=1).split(_PIECE):
        cosines = piece @ rows.T  # [piece, m]
        of_truth.append(cosines.amax(1))
        of_rows = torch.maximum(of_rows, cosines.amax(0))
    return torch.cat(of_truth), of_rows
