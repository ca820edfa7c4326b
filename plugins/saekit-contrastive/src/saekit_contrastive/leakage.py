"""The loss `leakage`: if a concept has its own latent, the other latents should not predict it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from saekit import Code, Step
from saekit_contrastive.class_contrast import has_both_classes
from saekit_contrastive.concept import Latents, resolve_latents

if TYPE_CHECKING:
    from saekit import RunContext


class Leakage:
    """How strongly latents other than the concepts' own correlate with a concept's label.

    With rho_j the correlation of latent j's activation with the label over the labelled positions of the step, it is

        sum over j of max(0, rho_j^2 - above)

    averaged over the concepts. Correlations are independent of scale, so shrinking activations does not lower it. It is
    computed from sums over active entries alone. A latent that hardly varies is left out.
    """

    def __init__(
        self,
        *,
        latents: Latents = None,
        above: Annotated[
            float,
            Field(
                ge=0, lt=1, description="Squared correlations up to this cost nothing: 0.01 is a correlation of 0.1."
            ),
        ] = 0.01,
    ) -> None:
        self._latents, self._above = latents, above
        self._chosen: dict[int, int] = {}

    def prepare(self, context: RunContext) -> None:
        """Find the concepts in the source. UsageError for a concept or a latent that does not exist."""
        self._chosen = resolve_latents(self._latents, list(context.source.concepts), context.sae.d_sae)

    def active(self, step: Step) -> bool:
        """Only if some concept has positions of both classes."""
        return step.sequences is not None and has_both_classes(step.sequences.labels_of_positions()[:, list(self._chosen)])

    def __call__(self, step: Step) -> Tensor:
        """The loss of one step's sequences."""
        batch = step.sequences
        assert batch is not None and batch.code is not None  # promised by the need `sequences`
        labels = batch.labels_of_positions()  # [m, n_concepts], of each row of the code
        own = torch.zeros(batch.code.d_sae, dtype=torch.bool, device=labels.device)
        own[list(self._chosen.values())] = True
        code = batch.code
        values = [self._of(code, labels[:, column], own) for column in self._chosen]
        return torch.stack(values).mean()

    def _of(self, code: Code, labels: Tensor, own: Tensor) -> Tensor:
        known = ~labels.isnan()
        n = known.sum().clamp_min(1)
        y = torch.where(known, labels, 0.0)
        y = torch.where(known, y - y.sum() / n, 0.0)  # [m], centred
        rows, latents, values = code.nonzero()
        kept = known[rows] & ~own[latents]
        rows, latents, values = rows[kept], latents[kept], values[kept]
        zero = values.new_zeros(code.d_sae)
        total, square, product = (
            zero.index_add(0, latents, part) for part in (values, values.square(), values * y[rows].to(values))
        )  # [d_sae] each
        spread = square - total.square() / n
        varies = spread.detach() > 1e-6 * square.detach()
        fraction = product.square() / torch.where(varies, spread, 1.0) / y.square().sum().clamp_min(1e-12)
        return ((fraction - self._above).relu() * varies).sum()
