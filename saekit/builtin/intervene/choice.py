"""Which latents are edited: by number, or the best one of each concept on training data; and the latents beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saekit.controls import matched_latents
from saekit.errors import OptionError
from saekit.ranks import auroc_of_latents
from saekit.runner.context import RunContext
from saekit.seeds import derived_seed


@dataclass
class Chosen:
    """One latent that is edited.

    concept: the concept that it was chosen for, or that it tells best; None without labels. auroc: how well it tells it on training
    data. usual: its mean activation there, where the concept is if there is one. controls: latents of similar density and size.
    """

    latent: int
    concept: str | None = None
    auroc: float | None = None
    usual: float = 0.0
    controls: list[int] = field(default_factory=list)


class Survey:
    """Every latent on the first activations of the training data, held as active entries: memory grows with these."""

    def __init__(self, context: RunContext, tokens: int) -> None:
        self.concepts = list(getattr(context.source, "concepts", None) or [])
        self.d_sae = d_sae = context.sae.d_sae
        entries: list[tuple[Tensor, Tensor, Tensor]] = []
        labels: list[Tensor] = []
        self._n = 0
        with torch.no_grad():
            for batch in context.training_activations(tokens):
                rows, latents, values = context.step(batch).code.nonzero()
                entries.append((rows + self._n, latents, values))
                self._n += len(batch)
                if batch.labels is not None:
                    labels.append(batch.labels)
        self._rows, self._latents, self._values = (torch.cat(parts) for parts in zip(*entries, strict=True))
        self._labels = torch.cat(labels) if labels else None  # [n, n_concepts]
        fired = torch.bincount(self._latents, minlength=d_sae)
        squares = torch.zeros(d_sae, dtype=torch.float64, device=fired.device)
        squares.index_add_(0, self._latents, self._values.double().square())
        largest = torch.zeros_like(squares).scatter_reduce_(0, self._latents, self._values.double(), "amax")
        self.density = fired / max(1, self._n)
        """[d_sae], the share of these activations at which each latent is active."""
        self.statistics = {"max": largest, "rms": (squares / fired.clamp_min(1)).sqrt()}
        """[d_sae] each, as `saekit.latent_statistics` gives them."""

    def best(self, concepts: Sequence[str]) -> list[Chosen]:
        """The latent that tells each concept best; no latent twice, the surest concept first."""
        aurocs = {concept: self._aurocs(concept).nan_to_num(0.0) for concept in concepts}
        free = self.density > 0
        found: dict[str, Chosen] = {}
        for concept in sorted(concepts, key=lambda name: -float(aurocs[name].max())):
            if not bool(free.any()):
                raise OptionError("concepts", f"no latent that fires is left for {concept!r}. Name fewer concepts.")
            own = aurocs[concept].masked_fill(~free, -1.0)
            latent = int(own.argmax())
            free[latent] = False
            found[concept] = Chosen(latent, concept, float(own[latent]), self._usual(latent, concept))
        return [found[concept] for concept in concepts]

    def given(self, latents: Sequence[int]) -> list[Chosen]:
        """These latents, each with the concept that it tells best, if there are labels."""
        aurocs = {name: self._aurocs(name).nan_to_num(0.0) for name in self.concepts} if self._labels is not None else {}
        found = []
        for latent in latents:
            concept = max(aurocs, key=lambda name: float(aurocs[name][latent]), default=None)
            auroc = None if concept is None else float(aurocs[concept][latent])
            found.append(Chosen(latent, concept, auroc, self._usual(latent, concept)))
        return found

    def add_controls(self, chosen: Sequence[Chosen], count: int, seed: int) -> None:
        """Draw for each of `chosen` `count` matched latents that are none of them; fewer if no more are active."""
        generator = torch.Generator().manual_seed(derived_seed("intervene", seed))
        every = [one.latent for one in chosen]
        for one in chosen:
            density = self.density.clone()
            density[[latent for latent in every if latent != one.latent]] = 0.0
            one.controls = matched_latents([one.latent] * count, density, self.statistics["rms"], generator)

    def _aurocs(self, concept: str) -> Tensor:
        """How well each latent tells the concept: [d_sae]."""
        if self._labels is None:
            raise OptionError("concepts", "the activations have no labels. Name the latents in latents instead.")
        labels = self._labels[:, self.concepts.index(concept)]
        return auroc_of_latents(self._rows, self._latents, self._values, labels, self.d_sae)

    def _usual(self, latent: int, concept: str | None) -> float:
        there = torch.ones(self._n, dtype=torch.bool, device=self._rows.device)
        if concept is not None and self._labels is not None:
            there = self._labels[:, self.concepts.index(concept)] == 1
        own = (self._latents == latent) & there[self._rows]
        return float(self._values[own].double().sum()) / max(1, int(there.sum()))
