"""`FeatureGraph`: which latents of a dictionary belong together. This is the data type; builders are components.

An edge points from a neighbour to a centre, as messages do in torch_geometric, which takes the graph as
`Data(edge_index=graph.edge_index)`. A graph knows the dictionary that it was built from and refuses to be used with another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.checked_tensors import load_checked, save_checked
from saekit.errors import UsageError

if TYPE_CHECKING:
    from saekit.sae.base import SparseAutoencoder

FORMAT = "saekit feature graph 2"


@dataclass(eq=False)
class FeatureGraph:
    """A weighted graph over the latents of one dictionary.

    nodes: number of latents.
    edge_index: [2, E] int64; in column e, latent `edge_index[0, e]` is a neighbour of latent `edge_index[1, e]`. An
        undirected edge appears twice.
    weight: [E] float32, one for each edge.
    dictionary: the digest of the decoder that it was built from, see `dictionary_digest`.
    builder: the qualified name of the component that built it; a run fills it in.

    Raises ValueError if the shapes do not fit or an edge names a latent that does not exist.
    """

    nodes: int
    edge_index: Tensor
    weight: Tensor
    dictionary: str
    builder: str = ""

    def __post_init__(self) -> None:
        edges, weight = self.edge_index, self.weight
        if edges.dtype != torch.long or edges.dim() != 2 or edges.shape[0] != 2:
            raise ValueError(f"edge_index must be int64 of shape [2, E], not {_kind(edges)}")
        if not weight.is_floating_point() or weight.shape != edges.shape[1:]:
            raise ValueError(
                f"weight must be floats of shape [{edges.shape[1]}], one for each edge, not {_kind(weight)}"
            )
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < self.nodes:
            raise ValueError(
                f"edge_index names latents {int(edges.min())} to {int(edges.max())}, but there are {self.nodes}"
            )
        self.weight = weight.float()

    @classmethod
    def of(cls, sae: SparseAutoencoder, edge_index: Tensor, weight: Tensor, builder: str = "") -> FeatureGraph:
        """The graph with these edges over the latents of `sae`: what a builder returns."""
        return cls(sae.d_sae, edge_index.detach(), weight.detach(), dictionary_digest(sae), builder)

    def require(self, sae: SparseAutoencoder) -> None:
        """Raise UsageError unless this graph was built from the dictionary of `sae`."""
        if self.nodes != sae.d_sae:
            raise UsageError(
                f"the feature graph{self._by} has {self.nodes} latents, but the SAE has {sae.d_sae}: it belongs to another "
                "dictionary. Build a graph from this SAE."
            )
        digest = dictionary_digest(sae)
        if self.dictionary != digest:
            raise UsageError(
                f"the feature graph{self._by} was built from another dictionary (W_dec {self.dictionary[:12]}, this SAE has "
                f"{digest[:12]}): its edges say nothing about these latents. Build it again from this SAE."
            )

    @property
    def _by(self) -> str:
        return f" of {self.builder}" if self.builder else ""

    def neighbours(self, latent: int) -> tuple[Tensor, Tensor]:
        """The latents with an edge to `latent`, and those edges' weights: [n] int64 and [n]."""
        if not 0 <= latent < self.nodes:
            raise IndexError(f"there is no latent {latent}: the graph has {self.nodes}")
        chosen = self.edge_index[1] == latent
        return self.edge_index[0, chosen], self.weight[chosen]

    def __eq__(self, other: object) -> bool:
        """Whether everything is equal, including the order of the edges."""
        if not isinstance(other, FeatureGraph):
            return NotImplemented
        return (
            (self.nodes, self.dictionary, self.builder) == (other.nodes, other.dictionary, other.builder)
            and torch.equal(self.edge_index, other.edge_index)
            and torch.equal(self.weight, other.weight)
        )

    def to(self, device: torch.device | str) -> FeatureGraph:
        """The same graph with its tensors on `device`."""
        return FeatureGraph(
            self.nodes, self.edge_index.to(device), self.weight.to(device), self.dictionary, self.builder
        )

    def save(self, path: str | Path) -> None:
        """Write the graph as one safetensors file."""
        facts = {"format": FORMAT, "nodes": self.nodes, "dictionary": self.dictionary, "builder": self.builder}
        save_checked(Path(path), {"edge_index": self.edge_index, "weight": self.weight}, facts)

    @classmethod
    def load(cls, path: str | Path) -> FeatureGraph:
        """The graph in the file `path`. UsageError if it is missing, damaged, or not a feature graph."""
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"{path}: there is no such file.")
        try:
            tensors, facts = load_checked(path)
        except UsageError as error:
            raise UsageError(f"{error} Build the graph again.") from None
        if facts is None or facts.get("format") != FORMAT:
            raise UsageError(f"{path}: is not a feature graph that this version of saekit can read. Build it again.")
        return cls(facts["nodes"], tensors["edge_index"], tensors["weight"], facts["dictionary"], facts["builder"])


def dictionary_digest(sae: SparseAutoencoder) -> str:
    """The SHA-256 of the decoder's rows as float32: two SAEs have the same digest only if their dictionaries are equal."""
    rows = sae.W_dec.detach().float().cpu().contiguous()  # [d_sae, d_out]
    digest = hashlib.sha256(str(tuple(rows.shape)).encode())
    digest.update(rows.numpy().data)
    return digest.hexdigest()


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"
