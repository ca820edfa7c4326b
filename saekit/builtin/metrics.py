"""The built-in metrics of held-out batches. Sums are kept in float64, over the whole held-out set."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from saekit.training.loss_input import Step

ROUNDING = 1e-12  # relative to a sum of squares in float64: the deviation that equal activations may seem to have


def deviation(square: Tensor, total: Tensor, rows: Tensor) -> float:
    """The squared deviation from the mean, summed over rows and coordinates; 0 if it could be rounding alone.

    square: the sum of squares. total: [d], the sum of the rows. rows: how many."""
    spread = float(square - total.square().sum() / rows)
    return spread if spread > ROUNDING * float(square) else 0.0


class Summed:
    """A metric whose state is a set of sums, which several processes add up.

    It is not a `torchmetrics.Metric`, which would fit, since that import takes longer than the rest of a dry run.
    """

    def sums(self, **sizes: int) -> None:
        """Declare the sums, each with its number of entries; 0 for a scalar."""
        for name, size in sizes.items():
            setattr(self, name, torch.zeros((size,) if size else (), dtype=torch.float64))

    def add(self, **values: Tensor | float) -> None:
        """Add to the sums; a sum that was declared as a scalar takes the shape of the first vector added."""
        for name, value in values.items():
            total = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
            setattr(self, name, getattr(self, name) + total)


class ExplainedVariance(Summed):
    """Explained variance (1 - FVU), FVU and mean squared error.

    FVU is the squared error over the squared deviation from the mean, both summed over the whole held-out set."""

    headline: ClassVar[tuple[str, ...]] = ("explained_variance",)
    meanings: ClassVar[dict[str, str]] = {
        "explained_variance": "share of the activations' variance that the reconstruction keeps; 1 is perfect",
        "fvu": "share of the activations' variance that the reconstruction misses; 0 is perfect",
        "mse": "squared error, averaged over activations and their coordinates",
    }
    undefined: ClassVar[dict[str, str]] = dict.fromkeys(("explained_variance", "fvu"), "the activations do not vary at all")
    error: Tensor
    square: Tensor
    total: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.sums(error=0, square=0, total=0, rows=0)
        self._width = 0

    def update(self, step: Step) -> None:
        """Take in one batch."""
        target = step.target.double()
        self._width = target.shape[1]
        self.add(error=step.error.double().square().sum(), square=target.square().sum(), rows=len(target))
        self.add(total=target.sum(0))  # [d_out]

    def compute(self) -> dict[str, float | None]:
        """explained_variance and fvu are None if the activations do not vary at all."""
        spread = deviation(self.square, self.total, self.rows)
        fvu = float(self.error) / spread if spread > 0 else None
        return {
            "explained_variance": None if fvu is None else 1.0 - fvu,
            "fvu": fvu,
            "mse": float(self.error) / (float(self.rows) * self._width) if self.rows else None,
        }


class L0(Summed):
    """Mean number of active latents."""

    headline: ClassVar[tuple[str, ...]] = ("l0",)
    meanings: ClassVar[dict[str, str]] = {"l0": "latents active on an activation, on average"}
    active: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.sums(active=0, rows=0)

    def update(self, step: Step) -> None:
        """Take in one batch."""
        self.add(active=step.code.count().double().sum(), rows=len(step.code))

    def compute(self) -> dict[str, float]:
        """l0."""
        return {"l0": float(self.active / self.rows)}


class Density(Summed):
    """How often latents fire: the median density (share of activations), and the share of latents above 10%."""

    meanings: ClassVar[dict[str, str]] = {
        "density_median": "share of activations on which a latent is active, for the latent in the middle",
        "dense_fraction": "share of latents that are active on more than a tenth of the activations",
    }

    fired: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.sums(fired=0, rows=0)

    def update(self, step: Step) -> None:
        """Take in one batch."""
        self.add(fired=step.code.fired(), rows=len(step.code))  # [d_sae]

    def _densities(self) -> Tensor:
        return self.fired / self.rows  # [d_sae]

    def compute(self) -> dict[str, float | None]:
        """density_median over the latents, dense_fraction of them above 0.1; None if nothing was measured."""
        if not self.rows:
            return {"density_median": None, "dense_fraction": None}
        density = self._densities()
        return {"density_median": float(density.median()), "dense_fraction": float((density > 0.1).double().mean())}


class Dead(Density):
    """Latents that never fired on the held-out set: their share and their number. Both depend on the size of the set."""

    headline: ClassVar[tuple[str, ...]] = ("dead_fraction",)
    meanings: ClassVar[dict[str, str]] = {
        "dead_latents": "latents that were never active on the held-out data",
        "dead_fraction": "share of latents that were never active on the held-out data",
    }

    def compute(self) -> dict[str, float | None]:
        """dead_fraction and dead_latents; None if nothing was measured."""
        if not self.rows:
            return {"dead_fraction": None, "dead_latents": None}
        dead = self._densities() == 0
        return {"dead_fraction": float(dead.double().mean()), "dead_latents": float(dead.sum())}


class Cosine(Summed):
    """Mean cosine of the angle between an activation and its reconstruction.

    A reconstruction of zero counts as 0; an activation of zero has no direction and is left out."""

    meanings: ClassVar[dict[str, str]] = {
        "cosine": "cosine of the angle between activation and reconstruction, on average; 1 is the same direction"
    }
    undefined: ClassVar[dict[str, str]] = {"cosine": "every activation is zero"}
    cosines: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.sums(cosines=0, rows=0)

    def update(self, step: Step) -> None:
        """Take in one batch."""
        target, reconstruction = step.target.double(), step.reconstruction.double()
        norms = target.norm(dim=1) * reconstruction.norm(dim=1)  # [batch]
        products = (target * reconstruction).sum(1)  # [batch]
        self.add(cosines=torch.where(norms == 0, 0.0, products / norms).sum(), rows=(target != 0).any(1).sum())

    def compute(self) -> dict[str, float | None]:
        """cosine; None if every activation is zero."""
        return {"cosine": float(self.cosines / self.rows) if self.rows else None}


class RelativeBias(Summed):
    """Relative reconstruction bias: the factor by which reconstructions are too short (below 1) or too long (above 1).

    gamma = argmin over g of E |x'/g - x|^2 = E |x'|^2 / E [x'.x] (Rajamanoharan et al. 2024a, eq. 9); an l1 loss makes
    it less than 1 by shrinking activations."""

    meanings: ClassVar[dict[str, str]] = {
        "relative_bias": "length of the reconstructions against the length that would fit best; below 1 they are shrunk"
    }
    undefined: ClassVar[dict[str, str]] = {"relative_bias": "the reconstructions do not point along the activations"}
    square: Tensor
    product: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.sums(square=0, product=0)

    def update(self, step: Step) -> None:
        """Take in one batch."""
        reconstruction = step.reconstruction.double()
        self.add(square=reconstruction.square().sum(), product=(reconstruction * step.target.double()).sum())

    def compute(self) -> dict[str, float | None]:
        """relative_bias; None if the reconstructions do not point along the activations at all."""
        return {"relative_bias": None if self.product <= 0 else float(self.square / self.product)}


class Histograms(Summed):
    """Quantiles of two histograms: the density over all latents, and the size of active activations.

    Sizes are counted in bins of a 64th of an octave from 2^-40 to 2^40, so that their quantiles are accurate to 1.1%."""

    QUANTILES: ClassVar[dict[str, float]] = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}
    OCTAVES: ClassVar[int] = 40
    BINS: ClassVar[int] = 64  # an octave
    meanings: ClassVar[dict[str, str]] = {
        **{f"density_{q}": f"share of activations on which a latent is active: {q} over all latents" for q in QUANTILES},
        **{f"activation_{q}": f"size of an activation that is not zero: {q} over all of them" for q in QUANTILES},
    }
    undefined: ClassVar[dict[str, str]] = {f"activation_{q}": "no latent is active" for q in QUANTILES}
    fired: Tensor
    rows: Tensor
    sizes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.sums(fired=0, rows=0, sizes=2 * self.OCTAVES * self.BINS)

    def update(self, step: Step) -> None:
        """Take in one batch."""
        _, _, values = step.code.nonzero()  # [nnz]
        bins = (values.double().abs().log2() + self.OCTAVES) * self.BINS
        bins = bins.floor().long().clamp(0, len(self.sizes) - 1)
        self.add(fired=step.code.fired(), rows=len(step.code), sizes=torch.bincount(bins, minlength=len(self.sizes)))

    def compute(self) -> dict[str, float | None]:
        """density_q05 to density_max, activation_q05 to activation_max; the latter are None if nothing is active."""
        density = self.fired / self.rows  # [d_sae]
        found: dict[str, float | None] = {f"density_{n}": float(density.quantile(q)) for n, q in self.QUANTILES.items()}
        reached = self.sizes.cumsum(0) / self.sizes.sum()  # [bins]
        for name, q in self.QUANTILES.items():
            place = int(torch.searchsorted(reached, torch.tensor(q, dtype=torch.float64) - 1e-12)) + 0.5
            found[f"activation_{name}"] = 2.0 ** (place / self.BINS - self.OCTAVES) if self.sizes.any() else None
        return found
