"""The graph builder `cosine`: latents whose decoder rows point the same way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saekit import Code, ComponentError, FeatureGraph, SparseAutoencoder
from saekit_graph.top_k_graph import Above, Neighbours, rows_in_a_block, top_k_graph

BLOCK = 1 << 26  # cosines held at a time: 256 MB of float32. Smaller blocks make the matrix products slower.


class Cosine:
    """Each latent's `k` neighbours with the largest cosine between decoder rows, exactly.

    Only weights are read, so a latent that never fires has neighbours too, and no activations are harvested. A row of
    zeros has none. Before training the rows are random, and so is their graph.

    The cosines are computed a block of rows at a time, in 256 MB at any width.
    """

    def __init__(self, *, k: Neighbours = 10, above: Above = 0.0) -> None:
        self.k, self.above = k, above

    def __call__(self, sae: SparseAutoencoder, codes: Iterator[Code]) -> FeatureGraph:
        """The graph. UsageError if the decoder is not finite."""
        rows = sae.W_dec.detach()  # [d_sae, d_out]
        if rows.dtype not in (torch.float32, torch.float64):
            rows = rows.float()
        norms = rows.norm(dim=1)
        if not bool(torch.isfinite(norms).all()):
            latent = int((~torch.isfinite(norms)).nonzero()[0])
            raise ComponentError(f"decoder row {latent} is not finite, so it has no direction.")
        inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(rows.dtype).tiny), 0.0)  # [d_sae]
        return top_k_graph(sae, cosine_blocks(rows, inverse), k=self.k, above=self.above)


@torch.no_grad()
def cosine_blocks(rows: Tensor, inverse: Tensor, elements: int = BLOCK) -> Iterator[tuple[int, Tensor]]:
    """(first row, cosines [n, d_sae]) for the rows [d_sae, d] of a dictionary, `inverse` [d_sae] of their norms.

    The next block overwrites the last. The dictionary is not copied: the products are divided by the norms."""
    size = rows_in_a_block(len(rows), elements)
    space = rows.new_empty(size, len(rows))
    for first in range(0, len(rows), size):
        some = rows[first : first + size] * inverse[first : first + size, None]
        yield first, torch.mm(some, rows.t(), out=space[: len(some)]).mul_(inverse)
