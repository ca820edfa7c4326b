"""`RunContext`: what metrics that need the model, analyzers, and `prepare` methods of losses are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.training.step import Step

if TYPE_CHECKING:
    import torch

    from saekit.activations.batch import Activations
    from saekit.config import RunConfig
    from saekit.graph import FeatureGraph
    from saekit.sae.base import SparseAutoencoder


@dataclass
class RunContext:
    """The run as seen from outside the training loop.

    sae: what it reads are the source's activations times `scale`; a transcoder makes its targets times `target_scale`.
    source: opened. directory: where an analyzer may write files. warn: tells the user. scale, target_scale: 1 once
    training is over; while a loss prepares itself before the first step, the factors that training applies
    (`training.normalize`). graph: what `[graph]` built of this SAE, for metrics and analyzers; None without it, and during
    training.
    """

    sae: SparseAutoencoder
    source: Any
    config: RunConfig
    device: torch.device
    directory: Path
    warn: Callable[[str], None]
    scale: float = 1.0
    target_scale: float = 1.0
    graph: FeatureGraph | None = None

    @property
    def seed(self) -> int:
        """What the initial weights and every draw but the order of the data are seeded by."""
        return self.config.training.seed

    def held_out(self, tokens: int | None = None) -> Iterator[Step]:
        """Held-out activations through the SAE, in the order of the documents, without gradients.

        tokens: how many activations at most; `evaluation.tokens` by default."""
        import torch

        wanted = tokens or self.config.evaluation.tokens
        with torch.no_grad():
            for batch in self.held_out_activations(wanted):
                yield self.step(batch)

    def step(self, batch: Activations) -> Step:
        """A batch of activations, as the source gives them, through the SAE."""
        x = batch.x * self.scale  # [batch, d_in]
        code = self.sae.encode(x)
        return Step(
            x=x,
            target=x if batch.target is None else batch.target * self.target_scale,
            code=code,
            reconstruction=self.sae.reconstruct(x, code),
            sae=self.sae,
            labels=batch.labels,
            tokens=batch.tokens,
        )

    def held_out_activations(self, tokens: int) -> Iterator[Any]:
        """Batches of held-out `Activations` as the source gives them, `tokens` in all at most, on the run's device."""
        size = self.config.evaluation.batch_size
        left = tokens
        training = self.config.training
        for block in self.source.blocks("held_out", size=min(tokens, training.buffer), seed=training.order_seed):
            for start in range(0, len(block), size):
                batch = block.rows(slice(start, min(start + size, start + left)))
                left -= len(batch)
                if len(batch):
                    yield batch.to(self.device)
                if left <= 0:
                    return
