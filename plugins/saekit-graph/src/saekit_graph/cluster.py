"""The loss `cluster`: a latent and its neighbours in the feature graph lean towards a labelled concept together.

`L_cluster = -(mu_pos - mu_neg)` of the mean over cluster_k = {k} and N(k) is `form = "raw"`; the other forms
cannot be satisfied by scale alone. All act on pre-activations, so that members which never fire move too.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from saekit_contrastive.class_contrast import Form, Margin
from saekit_contrastive.concept import Concept, Latents, On, bar
from torch import Tensor

from saekit import Code, FeatureGraph, Step


class Cluster(Concept):
    """On labelled sequences: `forms.contrast` of each cluster's mean pre-activation, averaged over the concepts.

    A cluster is a concept's latent with its neighbours in the graph that a callback keeps (`refresh_graph`). Before there
    is a graph the loss says nothing. A latent without neighbours is a cluster of its own.
    """

    where = "loss.cluster"

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
                description="What a cluster's mean is counted from. middle: halfway between the classes, so that it must "
                "tell them apart; bar: what a latent must exceed to fire, so that it must fire besides."
            ),
        ] = "middle",
    ) -> None:
        super().__init__(latents=latents, form=form, margin=margin, on=on)
        self._zero = zero
        self._graph: FeatureGraph | None = None
        self._members: list[Tensor] = []

    def active(self, step: Step) -> bool:
        """Only once there is a graph, and where some concept has sequences of both classes."""
        return step.graph is not None and super().active(step)

    def __call__(self, step: Step) -> Tensor:
        """The loss of one step's sequences; ValueError where the graph is of another number of latents."""
        assert step.graph is not None  # promised by the need `graph`, and by `active`
        if step.graph.nodes != step.sae.d_sae:
            raise ValueError(f"the graph has {step.graph.nodes} latents, but the SAE has {step.sae.d_sae}.")
        if step.graph is not self._graph:  # looking through all edges is done once a graph
            self._graph = step.graph
            self._members = [cluster_of(step.graph, latent) for latent in self._chosen.values()]
        return super().__call__(step)

    def _scores(self, code: Code, like: Tensor) -> Tensor:
        """Each cluster's mean pre-activation, less the row's bar if that is asked for: [rows, c]."""
        together, place = torch.cat(self._members).to(like.device).unique(return_inverse=True)
        columns = code.pre(together)  # [rows, m]
        parts = place.split([len(members) for members in self._members])
        scores = torch.stack([columns[:, part].mean(1) for part in parts], 1)
        return scores if self._zero == "middle" else scores - bar(code)[:, None]

    def _value(self, scores: Tensor, labels: Tensor) -> Tensor:
        return super()._value(_about_the_middle(scores, labels) if self._zero == "middle" else scores, labels)


def cluster_of(graph: FeatureGraph, latent: int) -> Tensor:
    """A latent and its neighbours, itself first: [1 + n] int64."""
    neighbours, _ = graph.neighbours(latent)
    return torch.cat([neighbours.new_tensor([latent]), neighbours[neighbours != latent]])


def _about_the_middle(scores: Tensor, labels: Tensor) -> Tensor:
    """scores [n, c] less the mean of the two classes' means, column by column; as they are where a class is missing."""
    centred = []
    for s, y in zip(scores.unbind(1), labels.unbind(1), strict=True):
        positive, negative = s[y > 0.5], s[y <= 0.5]  # NaN is in neither
        both = len(positive) and len(negative)
        centred.append(s - 0.5 * (positive.mean() + negative.mean()) if both else s)
    return torch.stack(centred, 1)
