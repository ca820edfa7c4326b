"""`Step`: the one thing that losses see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from saekit.activations.batch import Activations, SequenceBatch
    from saekit.graph import FeatureGraph
    from saekit.sae.base import SparseAutoencoder
    from saekit.sae.code import Code


@dataclass
class Step:
    """One batch on its way through the SAE.

    x: [batch, d_in], the activations that the SAE reads.
    target: [batch, d_out], what it must rebuild: `x` for an SAE, another site for a transcoder.
    code: the latents' activations, compressed where the architecture gates them to zero.
    reconstruction: [batch, d_out].
    labels: [batch, n_concepts] with NaN where a row has none; None if the source has no labels.
    tokens: [batch] token ids; None if the source has no tokens.
    number, fraction: which step (0 for the first), and how far through the run (0 to 1).
    dead: [d_sae], True for latents that have been silent for `training.dead_after` activations; None outside training.
    n_dead: how many were dead when they were last counted, a plain number that costs no synchronisation.
    sequences: whole labelled sequences with their code, a second stream beside x; only where a loss of the run needs them.
    graph: the feature graph that a callback keeps up to date; None before it has built one, and outside training.
    provided: what else callbacks keep up to date, by the word of their `provides`; see `Training.provided`.
    """

    x: Tensor
    target: Tensor
    code: Code
    reconstruction: Tensor
    sae: SparseAutoencoder
    labels: Tensor | None = None
    tokens: Tensor | None = None
    number: int = 0
    fraction: float = 0.0
    dead: Tensor | None = None
    n_dead: int = 0
    sequences: SequenceBatch | None = None
    graph: FeatureGraph | None = None
    provided: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, sae: SparseAutoencoder, batch: Activations, scale: float = 1.0, target_scale: float = 1.0, **known: Any
    ) -> Step:
        """A batch of activations, as a source gives them, through the SAE.

        scale, target_scale: what the SAE's inputs and a transcoder's targets are multiplied by. known: the fields that
            do not come from the batch."""
        x = batch.x * scale  # [batch, d_in]
        target = x if batch.target is None else batch.target * target_scale
        code = sae.encode(x)
        return cls(
            x=x,
            target=target,
            code=code,
            reconstruction=sae.reconstruct(x, code),
            sae=sae,
            labels=batch.labels,
            tokens=batch.tokens,
            **known,
        )

    @property
    def error(self) -> Tensor:
        """What the reconstruction misses, `target - reconstruction`: [batch, d_out]."""
        return self.target - self.reconstruction
