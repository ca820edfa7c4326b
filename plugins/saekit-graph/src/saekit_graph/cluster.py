"""The loss `cluster`: a latent and its neighbours in the feature graph lean towards a labelled concept together.

With `form = "activation"` it is `L_cluster = -(mu_pos - mu_neg)` of the mean activation over cluster_k = {k} and N(k), and
`raw` is the same of pre-activations; the other forms cannot be satisfied by scale alone. All but `activation` act on
pre-activations, so that members that never fire move too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from saekit_contrastive.class_contrast import Form, Margin, has_both_classes, scores_of
from saekit_contrastive.concept import (
    ConceptLatents,
    Latents,
    On,
    first_sequence_labels,
    labels_by,
    mean_contrast,
    scores_by,
)
from torch import Tensor

from saekit import Code, FeatureGraph, Step

if TYPE_CHECKING:
    from saekit import RunContext


class Cluster:
    """On labelled sequences: `class_contrast.contrast` of each cluster's mean pre-activation, averaged over the concepts.

    A cluster is a concept's latent with its neighbours in the graph that a callback keeps (`refresh_graph`); a latent
    without neighbours is a cluster by itself. The loss is inactive until there is a graph.
    """

    def __init__(
        self,
        *,
        latents: Latents = None,
        form: Form = "hinge",
        margin: Margin = 0.5,
        on: On = "tokens",
        zero: Annotated[
            Literal["middle", "bar"],
            Field(
                description="Where a cluster's mean is counted from. middle: halfway between the classes, so that it must "
                "tell them apart; bar: what each latent must exceed to fire, so that they must fire as well."
            ),
        ] = "middle",
    ) -> None:
        self._concepts = ConceptLatents(latents)
        self._form, self._margin, self._on, self._zero = form, margin, on, zero
        self._graph: FeatureGraph | None = None
        self._members: list[Tensor] = []

    def prepare(self, context: RunContext) -> None:
        """Find the concepts in the source, and check that both classes of each occur. UsageError if they do not."""
        self._concepts.prepare(context, first_sequence_labels(context, self._on))

    def active(self, step: Step) -> bool:
        """Only once there is a graph, and if some concept has positions, or sequences, of both classes."""
        if step.graph is None or step.sequences is None:
            return False
        return has_both_classes(self._concepts.labels(labels_by(step.sequences, self._on)))

    def __call__(self, step: Step) -> Tensor:
        """The loss of one step's sequences. ValueError if the graph has another number of latents than the SAE."""
        batch, graph = step.sequences, step.graph
        assert batch is not None and batch.code is not None and graph is not None  # promised by the needs, and `active`
        if graph.nodes != step.sae.d_sae:
            raise ValueError(f"the graph has {graph.nodes} latents, but the SAE has {step.sae.d_sae}.")
        if graph is not self._graph:  # all edges are searched only once per graph
            self._graph = graph
            self._members = [cluster_of(graph, latent) for latent in self._concepts.latents]
        scores = scores_by(self._scores(batch.code, batch.x), batch, self._on)  # [r, c]
        labels = self._concepts.labels(labels_by(batch, self._on))  # [r, c]
        if self._zero == "middle":
            scores = _about_the_middle(scores, labels)
        return mean_contrast(scores, labels, self._form, self._margin)

    def _scores(self, code: Code, like: Tensor) -> Tensor:
        """Each cluster's mean pre-activation, mean margin (`Code.margin`) if `zero` is "bar", or mean activation if that is the
        form: [rows, c]."""
        together, place = torch.cat(self._members).to(like.device).unique(return_inverse=True)
        counted = self._zero == "bar" or self._form == "activation"
        columns = scores_of(code, together, self._form) if counted else code.pre(together)  # [rows, m]
        parts = place.split([len(members) for members in self._members])
        return torch.stack([columns[:, part].mean(1) for part in parts], 1)


def cluster_of(graph: FeatureGraph, latent: int) -> Tensor:
    """A latent and its neighbours, itself first: [1 + n] int64."""
    neighbours, _ = graph.neighbours(latent)
    return torch.cat([neighbours.new_tensor([latent]), neighbours[neighbours != latent]])


def _about_the_middle(scores: Tensor, labels: Tensor) -> Tensor:
    """scores [n, c] minus the mean of the two classes' means, column by column; unchanged if a class is missing."""
    centred = []
    for s, y in zip(scores.unbind(1), labels.unbind(1), strict=True):
        positive, negative = s[y > 0.5], s[y <= 0.5]  # NaN is in neither
        both = len(positive) and len(negative)
        centred.append(s - 0.5 * (positive.mean() + negative.mean()) if both else s)
    return torch.stack(centred, 1)
