"""What sources give: rows of activations, whole labelled sequences, rows of tokens for the model, and runs of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from saekit.activations.trained_positions import TrainedPositions
    from saekit.sae.code import Code


@dataclass
class Activations:
    """Rows of activations and what is known about each; every tensor has `n` rows, or is None if unknown.

    x: [n, d_in].
    target: [n, d_out], None if the SAE rebuilds x itself.
    tokens: [n] ids.
    sequence: [n] number of the row of tokens that each came from, unique in its split.
    position: [n] place in that row.
    labels: [n, n_concepts], NaN if a row has no label.
    """

    x: Tensor
    target: Tensor | None = None
    tokens: Tensor | None = None
    sequence: Tensor | None = None
    position: Tensor | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def map(self, function) -> Activations:
        """`function` applied to every tensor that is not None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: None if v is None else function(v) for name, v in values.items()}
        return Activations(**changed)

    def rows(self, index: Tensor | slice) -> Activations:
        """Some rows, by index or slice."""
        return self.map(lambda tensor: tensor[index])

    def to(self, device: str | torch.device) -> Activations:
        """The same rows on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    @staticmethod
    def join(parts: list[Activations]) -> Activations:
        """Several pieces as one; a column must be known in all of them or in none."""
        import torch

        if len(parts) == 1:
            return parts[0]
        columns: dict[str, Any] = {}
        for f in fields(Activations):
            values = [getattr(part, f.name) for part in parts]
            columns[f.name] = None if values[0] is None else torch.cat(values)
        return Activations(**columns)


@dataclass
class SequenceBatch:
    """Whole labelled sequences, for losses that pool over positions.

    x: [n, T, d_in].
    mask: [n, T], True if a position belongs to the data (not padding, not left out by the source).
    labels: [n, n_concepts], NaN if a label is unknown; every sequence has at least one.
    tokens: [n, T] ids, None if there are none.
    target: [n, T, d_out], what a transcoder should rebuild at each position; None if the SAE rebuilds x itself.
    code: the SAE's code of x[mask], one row for each position of `mask.nonzero()`; only in a training step, where x is
        scaled as the SAE sees it.
    position_labels: [n, T, n_concepts], if some labels belong to a part of the positions. A sequence's own label is then the
        largest of its positions. None if every position has its sequence's labels.
    """

    x: Tensor
    mask: Tensor
    labels: Tensor
    tokens: Tensor | None = None
    target: Tensor | None = None
    code: Code | None = None
    position_labels: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def labels_of_positions(self) -> Tensor:
        """The labels of each position of `mask.nonzero()`: [m, n_concepts]."""
        if self.position_labels is not None:
            return self.position_labels[self.mask]
        return self.labels[self.mask.nonzero()[:, 0]]

    def to(self, device: str | torch.device) -> SequenceBatch:
        """The same sequences on another device, without a code."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "code"}
        moved: dict[str, Any] = {name: None if t is None else t.to(device, non_blocking=True) for name, t in tensors.items()}
        return SequenceBatch(**moved)


@dataclass
class TokenBatch:
    """Rows of tokens for the model.

    tokens: [n, T] ids.
    mask: [n, T], False at padding.
    keep: [n, T], True if the position's activation belongs to the data (not padding, not a first position that is left out).
    sequence: [n] numbers of the rows, unique in their split.
    """

    tokens: Tensor
    mask: Tensor
    keep: Tensor
    sequence: Tensor

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]], kept: TrainedPositions | None = None) -> TokenBatch:
        """Rows of token ids, padded on the right with 0. kept: which of their positions; None for all."""
        import torch

        width = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]  # [n, T]
        keep = mask if kept is None else mask & kept.in_rows(tokens)
        return cls(tokens, mask, keep.clone(), torch.arange(len(tokens)))


@dataclass
class RunBatch:
    """Whole sequences that went through the model, and can go through it again with other activations.

    x: [m, d_in], the activations at the hook point as `blocks` gives them.
    outputs: [k, n_outputs], what the model makes of them: a row for each sequence, or for each position of one.
    names: what the n_outputs columns are called, each with another name.
    sequence: [k], the number of the sequence that each row of the outputs belongs to, unique in the split.
    labels: [k, n_concepts], the labels of these rows, NaN where unknown; None if there are none.
    run: the outputs with a change [m, d_in] added to the activations, [k, n_outputs].
    """

    x: Tensor
    outputs: Tensor
    names: Sequence[str]
    sequence: Tensor
    labels: Tensor | None
    run: Callable[[Tensor], Tensor]
