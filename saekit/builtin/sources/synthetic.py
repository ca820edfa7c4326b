"""The source `synthetic`: activations made of a known dictionary, so that what training finds can be checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from saekit.activations.batch import Activations, SequenceBatch
from saekit.activations.shuffle import stop_point
from saekit.errors import OptionError, UsageError
from saekit.sae.code import SparseCode
from saekit.sae.kernels import Pattern
from saekit.seeds import derived_seed

_UNIT = 1024  # rows that are drawn together, from one seed


class SyntheticSource:
    """Sparse sums of random unit directions with Gaussian noise: x = sum of a_i f_i + noise.

    Each feature is active independently with its probability, and then has a magnitude drawn uniformly from `low` to
    `high`. `pairs` makes the features 0 and 1, 2 and 3, ... fire together: the correlation of the two indicators is
    `correlation`, and both take the mean of their probabilities.

    Only active features are drawn, so the cost does not grow with the number of inactive ones. After `open`,
    `truth` [n_features, d_in] holds the directions, and `codes` gives the true codes of `blocks`. Labels say whether
    the features listed in `concepts` are active. In a sequence of `sequences` each of them is active at every position or at none.
    """

    subject = None
    hook_point = None

    def __init__(
        self,
        *,
        d_in: Annotated[int, Field(gt=0, description="The width of the activations.")],
        n_features: Annotated[int, Field(gt=0, description="The number of true directions.")],
        probability: Annotated[
            float | list[float], Field(description="How often a feature is active, 0 to 1; a list has one for each.")
        ] = 0.01,
        power: Annotated[
            float,
            Field(ge=0, description="Feature i is active in proportion to (i + 1)^-power; the mean stays the same."),
        ] = 0.0,
        pairs: Annotated[int, Field(ge=0, description="How many pairs of features fire together.")] = 0,
        correlation: Annotated[float, Field(ge=0, lt=1, description="The correlation of the two features of a pair.")] = 0.8,
        low: Annotated[float, Field(gt=0, description="The least magnitude of an active feature.")] = 0.5,
        high: Annotated[float, Field(gt=0, description="The greatest magnitude of an active feature.")] = 1.5,
        noise: Annotated[float, Field(ge=0, description="Standard deviation of the noise in each coordinate.")] = 0.01,
        orthogonal: Annotated[bool, Field(description="Directions at right angles; d_in of them at most.")] = False,
        concepts: Annotated[list[int], Field(description="The features whose activity is given as labels.")] = [],  # noqa: B006
        length: Annotated[int, Field(gt=0, description="Positions in a labelled sequence.")] = 16,
        held_out: Annotated[int, Field(gt=0, description="Held-out activations.")] = 100_000,
        seed: Annotated[int, Field(ge=0, description="Decides the directions and the held-out activations.")] = 0,
    ) -> None:
        self.d_in = self.d_out = d_in
        self.n_features = n_features
        self.pairs, self.correlation = pairs, correlation
        self.low, self.high, self.noise = low, high, noise
        self.orthogonal = orthogonal
        self.length, self.held_out, self.seed = length, held_out, seed
        self.concepts = [f"feature {i}" for i in concepts]
        self.probability = self._probabilities(probability, power)  # [n_features]
        self._concepts = np.asarray(concepts, dtype=np.int64)
        if low > high:
            raise OptionError("low", f"{low} is more than high, which is {high}. Lower it.")
        if orthogonal and n_features > d_in:
            raise OptionError(
                "orthogonal",
                f"{n_features} directions cannot all be at right angles in {d_in} dimensions. "
                f"Lower n_features to {d_in}, or leave orthogonal out.",
            )
        for feature in concepts:
            if not 0 <= feature < n_features:
                raise OptionError("concepts", f"there is no feature {feature}; there are 0 to {n_features - 1}.")
        self.withheld = {} if concepts else dict.fromkeys(("labels", "sequences"), "List features in source.concepts.")
        self._rates, self._members = self._events()

    def peek(self) -> dict[str, Any]:
        """The width; see `protocols.Source.peek`."""
        active = float(self.probability.sum())
        data = f"synthetic: {self.n_features} features, {active:.3g} active on average"
        return {"d_in": self.d_in, "d_out": self.d_out, "data": data}

    def open(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Draw the directions."""
        self._device, self._dtype = torch.device(device), dtype
        generator = np.random.Generator(np.random.PCG64(derived_seed("directions", self.seed)))
        directions = generator.standard_normal((self.n_features, self.d_in))
        if self.orthogonal:
            directions = np.linalg.qr(directions.T)[0].T  # [n_features, d_in]
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        self._directions = torch.from_numpy(directions).float()
        self.truth = self._directions.to(self._device, dtype)

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[Activations]:
        """Blocks `start`, `start + 1`, ... of about `size` activations; see `protocols.Source.blocks`."""
        for units in self._units(split, size, start):
            x = torch.empty(len(units) * _UNIT, self.d_in)  # [n, d_in]
            labels = torch.zeros(len(x), len(self._concepts)) if self.concepts else None
            for place, unit in enumerate(units):
                stop_point()
                rows = slice(place * _UNIT, (place + 1) * _UNIT)
                entries = self._entries(split, seed, unit)
                self._compose(entries, x[rows], derived_seed("noise", *self._key(split, seed, unit)))
                if labels is not None:
                    self._label(entries, labels[rows])
            block = Activations(x.to(self._dtype), labels=labels).to(self._device)
            yield block.rows(slice(self._left(split, units)))

    def codes(self, split: str, *, size: int, seed: int, start: int = 0) -> Iterator[SparseCode]:
        """The true codes of `blocks`, called with the same arguments: each [n, n_features], in compressed rows."""
        for units in self._units(split, size, start):
            keys, values = [], []
            for place, unit in enumerate(units):
                key, value = self._entries(split, seed, unit)
                keys.append(key + place * _UNIT * self.n_features)
                values.append(value)
            rows, features = np.divmod(np.concatenate(keys), self.n_features)
            n = self._left(split, units)
            inside = rows < n
            of_row, of_feature = (torch.from_numpy(column[inside]).to(self._device) for column in (rows, features))
            pattern = Pattern.of_rows(of_row, of_feature, n, self.n_features)
            yield SparseCode(pattern, torch.from_numpy(np.concatenate(values)[inside]).to(self._device, self._dtype))

    def sequences(self, split: str, n: int, seed: int, number: int) -> SequenceBatch:
        """Batch `number` of `n` sequences; see `protocols.Source.sequences`. Each concept is in half of them."""
        self._check(split)
        if not self.concepts:
            raise OptionError("concepts", "is empty, so there are no labelled sequences. List some features.")
        first, last = number * n, (number + 1) * n
        if split == "held_out":
            last = max(first, min(last, self.held_out // self.length))
        x = torch.empty(last - first, self.length, self.d_in)  # [n, T, d_in]
        labels = torch.empty(last - first, len(self._concepts))
        for place, sequence in enumerate(range(first, last)):
            key = self._key(f"{split} sequences", seed, sequence)
            present = (
                np.random.Generator(np.random.PCG64(derived_seed("concepts", *key))).random(len(self._concepts)) < 0.5
            )
            entries = self._entries(f"{split} sequences", seed, sequence, self.length, self._concepts[present])
            self._compose(entries, x[place], derived_seed("noise", *key))
            labels[place] = torch.from_numpy(present)
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        return SequenceBatch(x.to(self._dtype), mask, labels).to(self._device)

    def identity(self) -> dict[str, Any]:
        """What determines the activations; see `protocols.Source.identity`."""
        return {
            "data": "synthetic",
            "d_in": self.d_in,
            "n_features": self.n_features,
            "probability": self.probability.tolist(),
            "pairs": self.pairs,
            "correlation": self.correlation,
            "magnitude": [self.low, self.high],
            "noise": self.noise,
            "orthogonal": self.orthogonal,
            "concepts": self._concepts.tolist(),
            "length": self.length,
            "held_out": self.held_out,
            "seed": self.seed,
        }

    # --- what is active ----------------------------------------------------------------------------------------

    def _probabilities(self, given: float | list[float], power: float) -> np.ndarray:
        if isinstance(given, list) and len(given) != self.n_features:
            raise OptionError(
                "probability", f"lists {len(given)} numbers for {self.n_features} features. Give one for each."
            )
        if isinstance(given, list) and power:
            raise OptionError("power", "goes with one probability, not with a list of them. Leave one of the two out.")
        weights = np.arange(1, self.n_features + 1, dtype=np.float64) ** -power
        p = np.asarray(given) if isinstance(given, list) else given * weights / weights.mean()
        if p.min() <= 0 or p.max() >= 1:
            wrong = int(p.argmax() if p.max() >= 1 else p.argmin())
            raise OptionError(
                "probability",
                f"feature {wrong} would be active with probability {p[wrong]:.3g}; it must be more "
                "than 0 and less than 1. Change probability or power.",
            )
        if 2 * self.pairs > self.n_features:
            raise OptionError(
                "pairs", f"{self.pairs} pairs need {2 * self.pairs} features; there are {self.n_features}."
            )
        of_pairs = p[: 2 * self.pairs].reshape(-1, 2)
        return np.concatenate([of_pairs.mean(1).repeat(2), p[2 * self.pairs :]])

    def _events(self) -> tuple[np.ndarray, np.ndarray]:
        """Independent Poisson events that make features active: the rate of each kind in one row, [m], and the one or
        two features that it makes active, [m, 2] (the same twice if it is one).

        A feature is active if any of its events has happened, so an event of rate -log(1 - p) alone makes it active
        with probability p exactly, however many events fall on the same place. Two of a pair with probability p and
        correlation c are both inactive with probability (1 - p)(1 - p(1 - c)), which these rates of a shared
        event and of a separate one for each give.
        """
        rates = -np.log1p(-self.probability)  # [n_features]
        paired = 2 * self.pairs
        own = -np.log1p(-self.probability[:paired] * (1 - self.correlation))  # [2 pairs]
        shared = (rates[:paired] - own)[::2]  # [pairs]
        rates[:paired] = own
        features = np.arange(self.n_features)
        members = np.stack([features, features], 1)
        return np.concatenate([rates, shared]), np.concatenate([members, features[:paired].reshape(-1, 2)])

    def _entries(
        self, split: str, seed: int, unit: int, rows: int = _UNIT, present: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The active features of a unit: keys row * n_features + feature, [nnz], in order, and their magnitudes, [nnz].

        present: concepts that are active in every row, the others of them in none."""
        generator = np.random.Generator(np.random.PCG64(derived_seed("activity", *self._key(split, seed, unit))))
        counts = generator.poisson(rows * self._rates)  # [m]
        kinds = np.repeat(np.arange(len(counts)), counts)
        where = generator.integers(0, rows, size=len(kinds), dtype=np.int64) * self.n_features
        first, second = self._members[kinds].T
        keys = where + first
        if self.pairs:
            both = first != second
            keys = np.concatenate([keys, (where + second)[both]])
        if present is not None:
            keys = keys[~np.isin(keys % self.n_features, self._concepts)]
            everywhere = np.arange(rows)[:, None] * self.n_features + present  # [rows, concepts present]
            keys = np.concatenate([keys, everywhere.ravel()])
        keys.sort()
        new = np.ones(len(keys), dtype=bool)
        np.not_equal(keys[1:], keys[:-1], out=new[1:])
        keys = keys[new]
        values = generator.random(len(keys), dtype=np.float32)
        values *= np.float32(self.high - self.low)
        values += np.float32(self.low)
        return keys, values

    # --- what it gives -----------------------------------------------------------------------------------------

    def _compose(self, entries: tuple[np.ndarray, np.ndarray], into: Tensor, noise_seed: int) -> None:
        """Fill `into` [rows, d_in] with the sums of the active directions and the noise."""
        keys, values = entries
        starts = np.searchsorted(keys, np.arange(len(into)) * self.n_features)  # [rows]
        features = torch.from_numpy(keys % self.n_features)
        if self.noise:
            into.normal_(0.0, self.noise, generator=torch.Generator().manual_seed(noise_seed))
        else:
            into.zero_()
        if len(keys):
            into += functional.embedding_bag(
                features,
                self._directions,
                torch.from_numpy(starts),
                mode="sum",
                per_sample_weights=torch.from_numpy(values),
            )

    def _label(self, entries: tuple[np.ndarray, np.ndarray], into: Tensor) -> None:
        rows, features = np.divmod(entries[0], self.n_features)
        for column, feature in enumerate(self._concepts):
            into[torch.from_numpy(rows[features == feature]), column] = 1.0

    def _units(self, split: str, size: int, start: int) -> Iterator[range]:
        """The units of block `start`, `start + 1`, ..."""
        self._check(split)
        height, number = max(1, round(size / _UNIT)), start
        while split == "train" or number * height * _UNIT < self.held_out:
            last = (number + 1) * height
            yield range(number * height, last if split == "train" else min(last, -(-self.held_out // _UNIT)))
            number += 1

    def _left(self, split: str, units: range) -> int:
        """How many rows of a block's units belong to the split: all, except at the end of the held-out ones."""
        rows = len(units) * _UNIT
        return rows if split == "train" else min(rows, self.held_out - units.start * _UNIT)

    def _key(self, split: str, seed: int, unit: int) -> tuple[int, ...]:
        """What the draws of a unit depend on; what is held out does not depend on the run's seed."""
        words = ("train", "held_out", "train sequences", "held_out sequences")
        return self.seed, words.index(split), 0 if split.startswith("held_out") else seed, unit

    @staticmethod
    def _check(split: str) -> None:
        if split not in ("train", "held_out"):
            raise UsageError(f"split {split!r}: there are only 'train' and 'held_out'.")
