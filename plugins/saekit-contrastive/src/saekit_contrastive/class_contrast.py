"""The contrast of two classes: how badly scores separate them, in forms that a larger scale alone cannot satisfy.

Scores are those of one latent; class 1 should score high, class 0 low. `hinge`, `bce` and `pairwise` take the scores in units
of their root mean square over the labelled rows, and gradients flow through that unit. They are then homogeneous of
degree 0: their gradient along the scores themselves is zero, so a step towards larger activations gains nothing.

- activation, raw: `-(mean of class 1 - mean of class 0)`. Unbounded below: doubling the scores doubles the gain. With
  `activation`, `scores` returns activations after the gate, so a silent latent has no gradient; otherwise it returns margins.
- hinge: how far class 1 falls short of `+margin`, and class 0 of `-margin`.
- bce: cross-entropy of the logistic of score / margin; each class weighs one half.
- pairwise: log(1 + exp(-difference / margin)), averaged over all pairs of one row of each class: a smooth AUROC
  (Yan et al. 2003; logistic in place of their hinge). It rewards order alone; only the unit, taken about zero, depends on the sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import relu, softplus
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from saekit import Code

FORMS = ("activation", "raw", "hinge", "bce", "pairwise")
Form = Annotated[
    Literal["activation", "raw", "hinge", "bce", "pairwise"],
    Field(
        description="hinge, bce and pairwise use units of the scores' RMS; raw is the plain difference of means, and "
        "activation is that of activations, which teaches a silent latent nothing."
    ),
]
"""The type of an option that chooses a form."""
Margin = Annotated[
    float,
    Field(gt=0, description="In units of RMS: for hinge how far from zero, for bce and pairwise the temperature."),
]
"""The type of the option `margin`."""
_PAIRS = 1 << 20  # differences held at a time by `pairwise`


def scores_of(code: Code, latents: Tensor, form: Form) -> Tensor:
    """What `form` contrasts: the latents' activations for `activation`, otherwise their margins: [batch, n]."""
    return code.columns(latents) if form == "activation" else code.margin(latents)


def contrast(scores: Tensor, labels: Tensor, *, form: Form = "hinge", margin: Margin = 0.5) -> Tensor | None:
    """How badly scores [n] separate rows of label 1 from rows of label 0, as a scalar; None if a class has no rows.

    labels: [n], 0, 1, or NaN for rows to leave out. A label above 0.5 counts as class 1.

    >>> contrast(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0]), form="hinge", margin=0.5)
    tensor(0.)
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, not {form!r}")
    known = ~labels.isnan()
    positive, negative = scores[known & (labels > 0.5)], scores[known & (labels <= 0.5)]  # [n_pos], [n_neg]
    if not len(positive) or not len(negative):
        return None
    if form in ("activation", "raw"):
        return negative.mean() - positive.mean()
    unit = root_mean_square(torch.cat([positive, negative]))
    positive, negative = positive / unit, negative / unit
    if form == "hinge":
        return 0.5 * (relu(margin - positive).mean() + relu(margin + negative).mean())
    if form == "bce":
        return 0.5 * (softplus(-positive / margin).mean() + softplus(negative / margin).mean())
    return _pairwise(positive / margin, negative / margin)


def contrasts(scores: Tensor, labels: Tensor, *, form: Form = "hinge", margin: Margin = 0.5) -> Tensor | None:
    """The mean of `contrast` over the columns of scores and labels [n, c] that have rows of both classes, or None."""
    pairs = zip(scores.unbind(1), labels.unbind(1), strict=True)
    values = [v for s, y in pairs if (v := contrast(s, y, form=form, margin=margin)) is not None]
    return torch.stack(values).mean() if values else None


def root_mean_square(scores: Tensor) -> Tensor:
    """The root mean square of all scores, about zero; 1 if all are zero, so that dividing by it is safe."""
    square = scores.square().mean()
    return torch.where(square > 0, square, torch.ones_like(square)).sqrt()


def has_both_classes(labels: Tensor) -> bool:
    """Whether some column of labels [n, c] has rows of both classes; otherwise `contrasts` returns None."""
    return bool(((labels > 0.5).any(0) & (labels <= 0.5).any(0)).any())


def _pairwise(positive: Tensor, negative: Tensor) -> Tensor:
    """Mean of softplus(negative - positive) over all pairs, `_PAIRS` at a time; backward recomputes them."""
    total = positive.new_zeros(())
    for rows in positive.split(max(1, _PAIRS // len(negative))):
        total = total + checkpoint(_of_pairs, rows, negative, use_reentrant=False)
    return total / (len(positive) * len(negative))


def _of_pairs(positive: Tensor, negative: Tensor) -> Tensor:
    return softplus(negative[None, :] - positive[:, None]).sum()
