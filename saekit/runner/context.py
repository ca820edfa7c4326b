"""`RunContext`: what model metrics, analyzers, and the `prepare` methods of losses and architectures are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from saekit.errors import RunError
from saekit.runner.held_out import CountedSource, HeldOutUse
from saekit.training.loss_input import Step

if TYPE_CHECKING:
    import torch

    from saekit.activations.batch import Activations
    from saekit.config import RunConfig
    from saekit.graph import FeatureGraph
    from saekit.protocols import Source
    from saekit.result import Result
    from saekit.sae.base import SparseAutoencoder


@dataclass
class RunContext:
    """The run as seen from outside the training loop.

    sae: it reads the source's activations times `scale`; a transcoder rebuilds its targets times `target_scale`.
    source: opened.
    directory: where an analyzer may write files.
    warn: tells the user.
    scale, target_scale: 1 once training is over; while a loss prepares itself before the first step, the factors that
        training applies (`training.normalize`).
    found: the `Result` of each callback that has one, by its label, for metrics and analyzers; empty during training.
    graph: what `[graph]` built of this SAE, for metrics and analyzers; None without it, and during training.
    use: counts the held-out data that is taken, for the summary; for metrics only.
    """

    sae: SparseAutoencoder
    source: Source
    config: RunConfig
    device: torch.device
    directory: Path
    warn: Callable[[str], None]
    scale: float = 1.0
    target_scale: float = 1.0
    graph: FeatureGraph | None = None
    use: HeldOutUse | None = None
    found: dict[str, Result] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed of the initial weights and of every draw but the order of the data."""
        return self.config.training.seed

    def step(self, batch: Activations) -> Step:
        """A batch of activations, as the source gives them, through the SAE."""
        return Step.of(self.sae, batch, self.scale, self.target_scale)

    def held_out(self, tokens: int | None = None) -> Iterator[Step]:
        """Held-out activations through the SAE, without gradients, in the order that every metric and analyzer sees.

        tokens: how many activations at most; `evaluation.tokens` by default."""
        import torch

        with torch.no_grad():
            for batch in self.held_out_activations(tokens or self.config.evaluation.tokens):
                yield self.step(batch)

    def held_out_activations(self, tokens: int) -> Iterator[Activations]:
        """Held-out activations as the source gives them, in batches on the run's device; at most `tokens` in all.

        Fewer are the beginning of more. Activations that are not finite are left out, with a warning. RunError if none is
        finite."""
        batches = self._activations("held_out", tokens, self.config.evaluation.batch_size)
        return batches if self.use is None else self.use.of_activations(batches)

    def training_activations(self, tokens: int) -> Iterator[Activations]:
        """The activations that training began with, or would have, as the source gives them, in batches on the run's device;
        at most `tokens` in all. Those that are not finite are left out, with a warning. RunError if none is finite."""
        return self._activations("train", tokens, self.config.training.batch_size)

    def _activations(self, split: str, tokens: int, size: int) -> Iterator[Activations]:
        """Batches of a split without the rows that are not finite; a warning says how many there were."""
        seen = bad = number = first = 0
        try:
            for number, batch in enumerate(self._batches(split, tokens, size), start=1):
                finite = _finite(batch)  # [n]
                seen += len(batch)
                if not bool(finite.all()):
                    first = first or number
                    bad += int((~finite).sum())
                    batch = batch.rows(finite)
                if len(batch):
                    yield batch
            if seen and bad == seen:
                raise RunError(
                    f"none of the {self._place(split)} is finite. Try another precision of the model, or another hook point."
                )
        finally:
            if bad:
                self.warn(
                    f"{bad:,} of {seen:,} {self._place(split)} are not finite, the first in batch {first}; they are left out."
                )

    def _place(self, split: str) -> str:
        name = "held-out" if split == "held_out" else "training"
        return f"{name} activations of {getattr(self.source, 'hook_point', None) or self.config.source.use}"

    def _batches(self, split: str, tokens: int, size: int) -> Iterator[Activations]:
        training, left = self.config.training, tokens
        # What is taken of a block counts, not the block.
        source = self.source.wrapped if isinstance(self.source, CountedSource) else self.source
        for block in source.blocks(split, size=min(tokens, training.buffer), seed=training.order_seed):
            for start in range(0, len(block), size):
                batch = block.rows(slice(start, min(start + size, start + left)))
                left -= len(batch)
                if len(batch):
                    yield batch.to(self.device)
                if left <= 0:
                    return


def _finite(batch: Activations) -> torch.Tensor:
    """Which rows of x, and of the target, are finite: [n]."""
    finite = batch.x.isfinite().all(1)
    return finite if batch.target is None else finite & batch.target.isfinite().all(1)
