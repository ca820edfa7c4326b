"""The sparse products of an SAE: decoding, and the gradients of decoder, encoder, biases and input on the active entries.

Everything is built from two primitives: a weighted sum of table rows for each bag of indices
(`torch.nn.functional.embedding_bag`), and a sampled product. With k of F latents active, each costs about k / F of the dense
product of the same shapes, so the encoder's dense product dominates a step.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn import functional

_GATHER_LIMIT = 1 << 24  # elements of a gathered block in the fallback of `sampled_product`: 64 MB of float32


@dataclass
class Pattern:
    """The positions of a code's entries, as compressed rows.

    indices: [nnz] latents, row after row.
    offsets: [batch + 1], row i is `indices[offsets[i]:offsets[i + 1]]`.
    d_sae: number of latents.
    k: number of entries in each row if all rows have the same number, else None.
    """

    indices: Tensor
    offsets: Tensor
    d_sae: int
    k: int | None = None

    @classmethod
    def regular(cls, latents: Tensor, d_sae: int) -> Pattern:
        """The pattern of `latents` [batch, k], with the same number in every row."""
        batch, k = latents.shape
        offsets = torch.arange(0, batch * k + 1, k, device=latents.device)
        return cls(latents.reshape(-1), offsets, d_sae, k)

    @classmethod
    def of_mask(cls, mask: Tensor) -> Pattern:
        """The entries that are True in `mask` [batch, d_sae]. The host waits to learn how many there are."""
        rows, indices = (column.contiguous() for column in mask.nonzero(as_tuple=True))
        return cls.of_rows(rows, indices, mask.shape[0], mask.shape[1])

    @classmethod
    def of_rows(cls, rows: Tensor, indices: Tensor, batch: int, d_sae: int) -> Pattern:
        """The pattern of entries (row, latent), [nnz] each, in the order of their rows."""
        offsets = torch.zeros(batch + 1, dtype=torch.long, device=rows.device)
        torch.cumsum(torch.bincount(rows, minlength=batch), 0, out=offsets[1:])
        pattern = cls(indices, offsets, d_sae)
        pattern.__dict__["rows"] = rows  # already known: fills the cached property
        return pattern

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.offsets.shape[0] - 1

    @cached_property
    def rows(self) -> Tensor:
        """The row of each entry: [nnz]."""
        if self.k:
            return torch.arange(self.indices.shape[0], device=self.indices.device) // self.k
        numbers = torch.arange(self.batch, device=self.indices.device)
        counts = self.offsets.diff()
        return torch.repeat_interleave(numbers, counts, output_size=self.indices.shape[0])

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """(order [nnz], offsets [d_sae + 1]): the entries sorted by latent, for products with the transpose."""
        order = torch.argsort(self.indices, stable=True)  # stable: the sums below always add in the same order
        counts = torch.bincount(self.indices, minlength=self.d_sae)
        offsets = torch.zeros(self.d_sae + 1, dtype=torch.long, device=self.indices.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        return order, offsets


def row_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices) of the k largest of each row, [rows, k] each, in no particular order. Ties are broken arbitrarily.

    On a CPU, columns are first dealt into groups. The k largest of a row are in the k groups with the largest maxima (up to
    ties), and maxima are found at the speed of memory, so only about 2 sqrt(k F) of F columns need to be ordered.
    """
    rows, columns = values.shape
    groups = 1 << max(0, math.ceil(math.log2((k * columns) ** 0.5)))
    size = columns // groups  # the columns left over, fewer than there are groups, are always searched
    if values.device.type != "cpu" or groups < k or size < 4:
        found = values.topk(k, dim=1, sorted=False)
        return found.values, found.indices
    dealt = values[:, : groups * size].unflatten(1, (size, groups))  # group g holds columns g, g + groups, ...
    best = dealt.amax(1).topk(k, dim=1, sorted=False).indices  # [rows, k]
    steps = torch.arange(0, groups * size, groups, device=values.device)  # [size]
    candidates = (steps[:, None] + best[:, None, :]).flatten(1)  # [rows, size * k] columns
    left = torch.arange(groups * size, columns, device=values.device).expand(rows, -1)
    candidates = torch.cat([candidates, left], 1)
    found = values.gather(1, candidates).topk(k, dim=1, sorted=False)
    return found.values, candidates.gather(1, found.indices)


def bag_sum(weights: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """Row i of the result is the sum of `weights[n] * table[indices[n]]` over n in bag i: [bags, d], no gradient."""
    if indices.shape[0] == 0:
        return table.new_zeros(offsets.shape[0] - 1, table.shape[1])
    return functional.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype), include_last_offset=True
    )


def transposed_sum(weights: Tensor, pattern: Pattern, rows_of: Tensor) -> Tensor:
    """Row j of the result is the sum of `weights[n] * rows_of[row of n]` over the entries n of latent j: [d_sae, d]."""
    order, offsets = pattern.by_latent
    return bag_sum(weights[order], pattern.rows[order], offsets, rows_of)


def latent_sum(weights: Tensor, pattern: Pattern) -> Tensor:
    """The sum of the weights of each latent's entries: [d_sae]."""
    return weights.new_zeros(pattern.d_sae).index_add_(0, pattern.indices, weights)


def sampled_product(pattern: Pattern, left: Tensor, right: Tensor) -> Tensor:
    """`left[row] . right[latent]` for every entry: [nnz], with left [batch, d] and right [d_sae, d]."""
    if left.device.type == "cpu" and left.dtype == right.dtype and left.dtype in (torch.float32, torch.float64):
        zeros = left.new_zeros(pattern.indices.shape[0])
        if len(zeros) == 0:
            return zeros
        _announce_csr()
        size = (pattern.batch, pattern.d_sae)
        mask = torch.sparse_csr_tensor(pattern.offsets, pattern.indices, zeros, size, check_invariants=False)
        return torch.sparse.sampled_addmm(mask, left, right.t(), beta=0.0).values()
    step = max(1, _GATHER_LIMIT // left.shape[1])
    parts = [
        (left[pattern.rows[i : i + step]] * right[pattern.indices[i : i + step]]).sum(1)
        for i in range(0, pattern.indices.shape[0], step)
    ]
    return torch.cat(parts) if parts else left.new_zeros(0)


@cache
def _announce_csr() -> None:
    """Create the process's first CSR tensor with torch's warning that they are in beta suppressed. It comes only once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))


class _Encode(torch.autograd.Function):
    """Gives the encoder's gradient to pre-activations that were computed and selected without one."""

    @staticmethod
    def forward(ctx, x: Tensor, W_enc: Tensor, b_enc: Tensor, selected: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.pattern = pattern
        return selected.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, W_enc = ctx.saved_tensors
        pattern = ctx.pattern
        d_x = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_x = bag_sum(grad, pattern.indices, pattern.offsets, W_enc.t())  # [batch, d_in]
        if ctx.needs_input_grad[1]:
            d_W = transposed_sum(grad, pattern, x).t()  # [d_in, d_sae], latent-major in memory like W_enc
        if ctx.needs_input_grad[2]:
            d_b = latent_sum(grad, pattern)  # [d_sae]
        return d_x, d_W, d_b, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, W_dec: Tensor, b_dec: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.pattern = pattern
        return bag_sum(values, pattern.indices, pattern.offsets, W_dec) + b_dec  # [batch, d_out]

    @staticmethod
    def backward(ctx, grad: Tensor):
        values, W_dec = ctx.saved_tensors
        pattern = ctx.pattern
        grad = grad.contiguous()
        d_values = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_values = sampled_product(pattern, grad, W_dec)  # [nnz]
        if ctx.needs_input_grad[1]:
            d_W = transposed_sum(values, pattern, grad)  # [d_sae, d_out]
        if ctx.needs_input_grad[2]:
            d_b = grad.sum(0)
        return d_values, d_W, d_b, None


class _ZeroShift(torch.autograd.Function):
    """See `zero_shift`."""

    @staticmethod
    def forward(ctx, b_dec: Tensor, W_enc: Tensor) -> Tensor:
        ctx.save_for_backward(W_enc)
        return W_enc.new_zeros(W_enc.shape[1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        (W_enc,) = ctx.saved_tensors
        return -(W_enc @ grad.to(W_enc.dtype)), None


def zero_shift(b_dec: Tensor, W_enc: Tensor) -> Tensor:
    """Zeros [d_sae] that, added to the encoder's bias, give b_dec the gradient of `(x - b_dec) @ W_enc`.

    They are for an input from which b_dec was subtracted without a gradient. Since b_dec is the same for the whole batch, the
    batch can be summed before the product with W_enc instead of after it: a product with a vector instead of [batch, d_sae]."""
    return _ZeroShift.apply(b_dec, W_enc)


def encode_selected(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, selected: Tensor, pattern: Pattern) -> Tensor:
    """The selected pre-activations [nnz], with gradients to x, W_enc and b_enc through those entries alone."""
    return _Encode.apply(x, W_enc, b_enc, selected, pattern)


def decode_sparse(values: Tensor, W_dec: Tensor, b_dec: Tensor, pattern: Pattern) -> Tensor:
    """`code @ W_dec + b_dec` of a sparse code: [batch, d_out], with gradients to values [nnz], W_dec and b_dec."""
    return _Decode.apply(values, W_dec, b_dec, pattern)
