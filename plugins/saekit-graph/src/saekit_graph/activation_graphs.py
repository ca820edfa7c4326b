"""The graph builders that compare activations: `correlation`, `coactivation` and `pmi`.

All three are positive only for latents that fire together at least once, so only such pairs are visited: the products
A^T A of sparse codes, a block of latents at a time. No [d_sae, d_sae] matrix is ever held, and the work grows not with
d_sae but with the pairs that fire: tokens * k^2, with k latents a token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from saekit import Code, FeatureGraph, SparseAutoencoder
from saekit_graph.top_k_graph import Above, Neighbours, rows_in_a_block, top_k_graph

BLOCK = 1 << 23  # pairs of latents held at a time: at most about 300 MB, temporaries included
MOST = 1 << 25  # firings kept, such as 1M activations of 32 latents: building a graph of these peaked at 1.55 GB

Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(joint, first, second) -> measure, all [pairs]: the joint sum of two latents, and their numbers."""


@dataclass
class Firings:
    """The codes of `tokens` activations. by_token: scipy CSR matrix [tokens, d_sae] of the non-zero activations."""

    by_token: Any

    @property
    def tokens(self) -> int:
        """The number of activations."""
        return self.by_token.shape[0]

    def counts(self) -> np.ndarray:
        """The number of activations on which each latent fires: [d_sae] float64."""
        return np.bincount(self.by_token.indices, minlength=self.by_token.shape[1]).astype(np.float64)

    @classmethod
    def of(cls, codes: Iterator[Code], d_sae: int, dtype: Any, most: int = MOST) -> Firings:
        """The firings in `codes`: 1 each for an integer `dtype`, else the activations. After `most` firings it stops with a
        warning, so that a code that is hardly sparse is counted on fewer activations."""
        from scipy.sparse import csr_matrix

        latents, values, lengths, held = [np.empty(0, np.int32)], [np.empty(0, dtype)], [np.zeros(1, np.int64)], 0
        for code in codes:
            rows, indices, activations = (t.detach().cpu() for t in code.nonzero())
            if held + len(rows) > most:
                tokens = sum(map(len, lengths)) - 1
                warnings.warn(
                    f"the code is hardly sparse: {held} firings on the first {tokens} activations. The feature graph is "
                    "built from these.",
                    stacklevel=2,
                )
                break
            held += len(rows)
            latents.append(indices.to(torch.int32).numpy())
            values.append(_values(activations, dtype))
            lengths.append(torch.bincount(rows, minlength=len(code)).numpy())
        offsets = np.cumsum(np.concatenate(lengths))
        joined = np.concatenate(latents)
        latents.clear()  # holding both forms would be the peak of memory
        return cls(
            csr_matrix((np.concatenate(values), joined, offsets.astype(np.int32)), shape=(len(offsets) - 1, d_sae))
        )

    def pearson(self) -> Measure:
        """The Pearson correlation of two latents' activations, zeros included; 0 for a latent that does not vary."""
        n = max(self.tokens, 1)
        means = np.asarray(self.by_token.sum(0)).ravel() / n
        squares = np.asarray(self.by_token.power(2).sum(0)).ravel() / n
        variances = squares - means**2
        # A constant's variance by rounding alone counts as zero.
        inverse = np.where(variances > 1e-12 * squares, 1 / np.sqrt(np.maximum(variances, 1e-300)), 0.0)

        def of(joint: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            return (joint / n - means[ours] * means[theirs]) * inverse[ours] * inverse[theirs]

        return of

    def joint(self, elements: int = BLOCK) -> Iterator[tuple[int, Any]]:
        """(first latent, scipy CSR matrix [n, d_sae]) for each block: sums over activations of the products of two latents."""
        by_latent = self.by_token.T.tocsr()  # [d_sae, tokens]
        d_sae = by_latent.shape[0]
        size = rows_in_a_block(d_sae, elements)
        for first in range(0, d_sae, size):
            yield first, by_latent[first : first + size] @ self.by_token

    def measured(self, measure: Measure, elements: int = BLOCK) -> Iterator[tuple[int, Tensor]]:
        """(first latent, measure [n, d_sae] float64) for each block of latents; zero for pairs that never fire together."""
        for first, joint in self.joint(elements):
            ours = first + np.repeat(np.arange(joint.shape[0]), np.diff(joint.indptr))
            joint.data = measure(joint.data, ours, joint.indices)
            yield first, torch.from_numpy(joint.toarray())


def _values(activations: Tensor, dtype: Any) -> np.ndarray:
    if np.issubdtype(dtype, np.integer):
        return np.ones(len(activations), dtype)
    return activations.double().numpy().astype(dtype, copy=False)


class Correlation:
    """Each latent's `k` neighbours with the largest Pearson correlation of activations, exactly.

    cov(f_i, f_j) / (std(f_i) std(f_j)) over all activations, zeros included. A latent that never fires has no neighbours.
    Latents that never fire together correlate negatively and get no edge.
    """

    def __init__(self, *, k: Neighbours = 10, above: Above = 0.0) -> None:
        self.k, self.above = k, above

    def __call__(self, sae: SparseAutoencoder, codes: Iterator[Code]) -> FeatureGraph:
        firings = Firings.of(codes, sae.d_sae, np.float64)
        return top_k_graph(sae, firings.measured(firings.pearson()), k=self.k, above=self.above)


class Coactivation:
    """Each latent's `k` neighbours with the largest Jaccard index of firing, exactly.

    The activations on which both fire as a share of those on which either fires: n_ij / (n_i + n_j - n_ij). A latent that
    never fires has no neighbours.
    """

    def __init__(self, *, k: Neighbours = 10, above: Above = 0.0) -> None:
        self.k, self.above = k, above

    def __call__(self, sae: SparseAutoencoder, codes: Iterator[Code]) -> FeatureGraph:
        firings = Firings.of(codes, sae.d_sae, np.int32)
        counts = firings.counts()

        def jaccard(joint: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            return joint / (counts[ours] + counts[theirs] - joint)

        return top_k_graph(sae, firings.measured(jaccard), k=self.k, above=self.above)


class PMI:
    """Each latent's `k` neighbours with the largest pointwise mutual information of firing, exactly (Church and Hanks, 1990).

    log(p_ij / (p_i p_j)), in nats, where p is the share of activations with firing. It is largest for rare latents that
    fired together by chance, so a pair must fire together `least` times. A latent that never fires has no neighbours.
    """

    def __init__(
        self,
        *,
        k: Neighbours = 10,
        above: Above = 0.0,
        least: Annotated[
            int, Field(gt=0, description="How often a pair must fire together to get an edge.")
        ] = 5,
    ) -> None:
        self.k, self.above, self.least = k, above, least

    def __call__(self, sae: SparseAutoencoder, codes: Iterator[Code]) -> FeatureGraph:
        firings = Firings.of(codes, sae.d_sae, np.int32)
        counts, tokens = firings.counts(), firings.tokens

        def information(joint: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            # Both products are whole numbers, exact in float64: independence gives exactly 0, and so no edge.
            found = np.log(joint * float(tokens) / (counts[ours] * counts[theirs]))
            return np.where(joint >= self.least, found, 0.0)

        return top_k_graph(sae, firings.measured(information), k=self.k, above=self.above)
