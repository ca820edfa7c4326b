"""Concept vectors: directions in activation space that stand for a concept, from a file or from labelled sequences."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from saekit import OptionError
from saekit_contrastive.probes import difference_of_means, logistic

if TYPE_CHECKING:
    from saekit import SequenceBatch
    from saekit.protocols import Source

BATCH = 32
"""Sequences requested from a source at a time."""
POSITIONS = 100_000
"""The most positions that vectors are computed from: 0.9 GB at a width of 2304."""
METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "difference_of_means": difference_of_means,
    "logistic_probe": logistic,
}
"""How to compute a vector [width] from activations x [n, width] and labels [n]. The second separates the classes best, but
that need not be the direction that the concept adds to the activations (Haufe et al. 2014), as a decoder row should."""
RANDOM = "random"
"""In place of a method: a direction for each concept that has nothing to do with it, as a control."""

_KNOWN: weakref.WeakKeyDictionary[Any, dict[tuple, Tensor]] = weakref.WeakKeyDictionary()
# by source: several variants of one run ask for the same vectors


def read_vectors(path: str | Path, width: int) -> Tensor:
    """The concept vectors in a file, one per row: [n, width], in float32, with their norms unchanged.

    path: .npy with [width] or [n, width]; .safetensors with one or several such tensors, read in the order of their
        names. UsageError if the file is missing, cannot be read, or contains what `checked` refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise refused(
            f"{path}: there is no such file. Name one that ends in .npy or .safetensors, or {', '.join(METHODS)} or {RANDOM}."
        )
    rows = []
    for name, tensor in _tensors(path):
        if tensor.dim() not in (1, 2) or not tensor.is_floating_point():
            shape = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise refused(f"{path}{name}: is {shape}, but must be numbers of shape (n, {width}), one vector per row.")
        rows.append(checked(tensor.float().reshape(-1, tensor.shape[-1]), width, f"{path}{name}: "))
    if not any(map(len, rows)):
        raise refused(f"{path}: holds no vector.")
    return torch.cat(rows)


def refused(message: str) -> OptionError:
    """The error of vectors that cannot be used."""
    return OptionError("fixed_vectors", message)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name for messages, tensor) for everything in the file. Nothing is unpickled."""
    try:
        if path.suffix == ".npy":
            import numpy as np

            loaded = {"": torch.from_numpy(np.load(path, allow_pickle=False))}
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = {f": tensor {name!r}": tensor for name, tensor in load_file(path).items()}
        else:
            raise refused(f"{path}: ends in {path.suffix!r}. Save the vectors as .npy or .safetensors.")
    except OptionError:
        raise
    except Exception as error:  # a damaged file raises different errors in each format
        raise refused(f"{path}: cannot be read: {type(error).__name__}: {error}.") from None
    yield from sorted(loaded.items())


def checked(vectors: Tensor, width: int, source: str = "") -> Tensor:
    """`vectors` [n, width] unchanged. OptionError if they cannot be decoder rows; `source` begins its message."""
    if vectors.shape[1] != width:
        raise refused(
            f"{source}the vectors have width {vectors.shape[1]}, but decoder rows have width {width} here. Take vectors of "
            "the model and hook point of this run."
        )
    for number, vector in enumerate(vectors):
        if not bool(torch.isfinite(vector).all()):
            raise refused(f"{source}vector {number} contains NaN or infinity. Compute it again.")
        if not bool(vector.any()):
            raise refused(f"{source}vector {number} is zero, so it has no direction. Leave it out, or compute it again.")
    return vectors


def concept_columns(names: list[str], wanted: list[str] | None) -> list[int]:
    """The label columns named by `wanted`; all of them by default. UsageError for one that is missing."""
    if not names:
        raise refused(
            "must be computed from labelled sequences, but the source has none. Use a source "
            "with labels (see: saekit plugins, sources that provide 'sequences'), or give a file."
        )
    for name in wanted or []:
        if name not in names:
            raise OptionError("concepts", f"the source has no label {name!r}. It has: {', '.join(names)}.")
    return [names.index(name) for name in (names if wanted is None else wanted)]


def random_vectors(n: int, width: int, seed: int) -> Tensor:
    """Directions drawn at random from the unit sphere: [n, width]."""
    return functional.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def vectors_of(
    source: Source, method: str, columns: list[int], *, sequences: int, seed: int, output: bool = False
) -> Tensor:
    """A unit vector for each of the label columns, computed from training data: [n, width], on the CPU.

    method: a name in `METHODS`.
    sequences: the number of labelled sequences to read, up to `POSITIONS` positions.
    output: use a transcoder's target instead of its input. UsageError if a column has only one class. A second call
        with the same arguments reads nothing.
    """
    known = _KNOWN.setdefault(source, {})
    key = (method, tuple(columns), sequences, seed, output)
    if key not in known:
        x, labels = _labelled(source, columns, sequences, seed, output)
        vectors = torch.stack(
            [_vector(METHODS[method], x, labels[:, i], source.concepts[c]) for i, c in enumerate(columns)]
        )
        known[key] = functional.normalize(checked(vectors, x.shape[1]), dim=1)
    return known[key]


def _labelled(source: Source, columns: list[int], sequences: int, seed: int, output: bool) -> tuple[Tensor, Tensor]:
    """Activations [N, width] at the positions of training sequences, and the labels [N, n] of each."""
    parts: list[tuple[Tensor, Tensor]] = []
    for number in range(-(-sequences // BATCH)):
        batch: SequenceBatch = source.sequences("train", min(BATCH, sequences), seed, number)
        x = batch.target if output else batch.x  # [n, T, width]
        assert x is not None  # a transcoder's source has a target
        parts.append((x[batch.mask].float().cpu(), batch.labels_of_positions()[:, columns].cpu()))
        if sum(len(part) for part, _ in parts) >= POSITIONS:
            break
    x, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return x, labels


def _vector(method: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor, name: str) -> Tensor:
    """The vector [width] of one concept; positions with an unknown label are left out."""
    for value in (0, 1):
        if not bool((labels == value).any()):
            raise OptionError(
                "fixed_vectors",
                f"no labelled sequence that was read has {name} = {value}, so there is nothing to "
                "tell apart. Raise sequences, or give data of both classes.",
            )
    known = ~labels.isnan()
    return method(x[known], labels[known])
