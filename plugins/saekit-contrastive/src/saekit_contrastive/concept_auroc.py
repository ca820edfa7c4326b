"""The metric `concept_auroc`: how well latents predict their concepts on held-out sequences, compared with yardsticks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from saekit import Estimate, auroc, auroc_interval, auroc_of_latents
from saekit_contrastive.concept import Latents, resolve_latents
from saekit_contrastive.labelled_codes import LabelledCodes, encode_labelled
from saekit_contrastive.probes import difference_of_means, logistic

if TYPE_CHECKING:
    from saekit import Interval, RunContext, SparseAutoencoder

LEAKS = 0.9
"""Another latent with an AUROC over sequences above this predicts the concept too."""
_MEANINGS = {
    "auroc_tokens": "how often the latent is higher at a position of the concept than at another position; 0.5 is chance",
    "auroc_sequences": "the same for the latent's mean over a sequence",
    "e_pos": "the latent's mean activation at positions of the concept",
    "e_neg": "the latent's mean activation at the others",
    "delta": "the first of these means minus the second",
    "ratio": "the first of these means divided by the second; undefined where the latent never fires at the others",
    "firing_pos": "share of the concept's positions where the latent fires",
    "firing_neg": "share of the other positions where the latent fires",
    "std": "standard deviation of the latent's activation",
    "mean_std": "standard deviation of a latent's activation, on average over all latents",
    "max_std": "the largest standard deviation of any latent",
    "leakage": f"share of the other living latents with an AUROC above {LEAKS} over sequences, for the concept or against it",
    "rest_auroc_tokens": "AUROC over positions of a logistic probe of what all other latents reconstruct",
    "other_auroc_tokens": "AUROC over positions of the best other latent; it and its sign are chosen on training data",
    "other_auroc_sequences": "AUROC over sequences of the best other latent; it and its sign are chosen on training data",
    "other_latent_tokens": "number of the latent that is best over positions",
    "other_latent_sequences": "number of the latent that is best over sequences",
    "other_sign_tokens": "1 if that latent fires for the concept, -1 if against it",
    "other_sign_sequences": "1 if that latent fires for the concept, -1 if against it",
    "means_auroc_tokens": "AUROC over positions of the difference of means of training activations",
    "means_auroc_sequences": "AUROC over sequences of the difference of means of training activations",
    "probe_auroc_tokens": "AUROC over positions of a logistic probe of training activations",
    "probe_auroc_sequences": "AUROC over sequences of a logistic probe of training activations",
}
FEW = 20
"""With fewer held-out sequences of either class than this, a warning says that the numbers are rough."""
Values = dict[str, float | Estimate | None]


class ConceptAUROC:
    """AUROC, means and firing rates of concepts' latents, on the gated code of held-out labelled sequences.

    AUROCs are exact, by ranks with ties averaged; beside each stand its 95% interval, clustered by sequence (see
    `saekit.auroc_interval`), and how many positions and sequences it was measured on. Positions take their sequence's label.
    Over sequences, scores are means over positions. Other latents may fire for the concept or against it: against it, their
    AUROC is 1 less the plain one. Probes are fitted, and the best other latent and every latent's sign are chosen, on training
    sequences. Names begin with `concept_`; if the source has several concepts, they end in `_` and the concept's name.
    """

    headline: ClassVar[tuple[str, ...]] = (
        "concept_auroc_tokens", "concept_auroc_sequences", "concept_e_pos", "concept_e_neg", "concept_std", "concept_leakage",
    )  # fmt: skip

    def __init__(
        self,
        *,
        latents: Latents = None,
        sequences: Annotated[
            int, Field(ge=16, description="The most sequences of each split to use.")
        ] = 256,
        tokens: Annotated[
            int,
            Field(gt=0, description="About the most positions of each split to use: their activations are held in memory."),
        ] = 33_000,
    ) -> None:
        self._latents, self._sequences, self._tokens = latents, sequences, tokens
        self._chosen: dict[int, int] = {}
        self._endings: dict[int, str] = {}
        self.meanings: dict[str, str] = {}

    def prepare(self, context: RunContext) -> None:
        """Find the concepts and name the values. UsageError for a concept or a latent that does not exist."""
        concepts = list(context.source.concepts)
        self._chosen = resolve_latents(self._latents, concepts, context.sae.d_sae)
        several = len(self._chosen) > 1
        self._endings = {column: f"_{concepts[column]}".replace(" ", "_") * several for column in self._chosen}
        self.meanings = {
            f"concept_{name}{ending}": meaning
            for ending in self._endings.values()
            for name, meaning in _MEANINGS.items()
        }
        if several:
            self.headline = tuple(f"concept_auroc_tokens{ending}" for ending in self._endings.values())  # type: ignore[misc]

    @torch.no_grad()
    def measure(self, context: RunContext) -> Values:
        """All values for every concept; None if a class does not occur, with a warning."""
        train, held_out = (
            encode_labelled(context, split, self._chosen.values(), sequences=self._sequences, tokens=self._tokens)
            for split in ("train", "held_out")
        )
        values: Values = {}
        for column, latent in self._chosen.items():
            own: Values = dict.fromkeys(_MEANINGS)
            name = context.source.concepts[column]
            if all(_both(part.of_tokens(column)) for part in (train, held_out)):
                own |= _of_latent(held_out, column, latent)
                own |= _others(train, held_out, column, latent)
                own |= _yardsticks(train, held_out, column, train.x, held_out.x)
                own |= _rest(train, held_out, column, latent, context.sae)
                _warn_if_few(context, held_out, column)
                if own["firing_pos"] == own["firing_neg"] == 0.0:
                    context.warn(
                        f"Latent {latent}, of concept {name!r}, never fires on held-out sequences, so its AUROC is 0.5."
                    )
                elif own["ratio"] is None:
                    context.warn(f"Latent {latent}, of concept {name!r}, fires only for it, so concept_ratio is not defined.")
            else:
                context.warn(f"Concept {name!r} does not occur as both 0 and 1 in each split, so no AUROC is defined.")
            values |= {f"concept_{key}{self._endings[column]}": value for key, value in own.items()}
        return values


def _both(labels: Tensor) -> bool:
    return bool((labels > 0.5).any() and (labels <= 0.5).any())


def _of_latent(data: LabelledCodes, column: int, latent: int) -> Values:
    """The values of the latent itself on held-out data."""
    labels, f = data.of_tokens(column), data.columns[latent]  # [n] each
    over_tokens, over_sequences = _over_tokens(data, column, f), _over_sequences(data, column, data.pooled(f))
    positive, negative = f[labels > 0.5].double(), f[labels <= 0.5].double()
    e_pos, e_neg = float(positive.mean()), float(negative.mean())
    deviations = data.deviations()
    return {
        "auroc_tokens": replace(over_tokens, note=_by_chance(over_tokens)),
        "auroc_sequences": replace(over_sequences, note=_by_chance(over_sequences)),
        "e_pos": e_pos,
        "e_neg": e_neg,
        "delta": e_pos - e_neg,
        "ratio": e_pos / e_neg if e_neg > 0 else None,
        "firing_pos": float((positive != 0).double().mean()),
        "firing_neg": float((negative != 0).double().mean()),
        "std": float(deviations[latent]),
        "mean_std": float(deviations.mean()),
        "max_std": float(deviations.max()),
    }


def _others(train: LabelledCodes, held_out: LabelledCodes, column: int, latent: int) -> Values:
    """How well the other latents predict the concept, each with the sign that it has on training data."""
    found: Values = {}
    for unit in ("tokens", "sequences"):
        fitted, measured = (_every(data, column, unit) for data in (train, held_out))
        if fitted.isnan().all() or measured.isnan().all():  # every sequence has the label, at some of its positions
            continue
        against = fitted < 0.5  # [d_sae]
        strength = (fitted - 0.5).abs()
        strength[latent] = -1.0
        best = int(strength.argmax())
        measured = torch.where(against, 1.0 - measured, measured)
        sign = -1.0 if against[best] else 1.0
        found[f"other_auroc_{unit}"] = _of_other(held_out, column, best, sign, unit)
        found[f"other_latent_{unit}"] = float(best)
        found[f"other_sign_{unit}"] = sign
        if unit == "sequences":
            living = held_out.sums[2] > 0
            living[latent] = False
            found["leakage"] = float((measured[living] > LEAKS).double().mean()) if living.any() else 0.0
    return found


def _of_other(data: LabelledCodes, column: int, latent: int, sign: float, unit: str) -> Estimate:
    """The AUROC of another latent, times its sign: over the positions whose whole code was kept, or over sequences."""
    if unit == "sequences":
        return _over_sequences(data, column, sign * data.pooled_code[:, latent])
    f = data.values.new_zeros(len(data.some))
    own = data.latents == latent
    f[data.rows[own]] = data.values[own]
    return _over_tokens(data, column, sign * f, data.some)


def _over_tokens(data: LabelledCodes, column: int, scores: Tensor, some: Tensor | None = None) -> Estimate:
    """The AUROC of scores of all positions [n], or of those numbered `some`, clustered by sequence."""
    labels, sequence = data.of_tokens(column), data.sequence
    if some is not None:
        labels, sequence = labels[some], sequence[some]
    sequences = {name: len(sequence[chosen].unique()) for name, chosen in _classes(labels)}
    positions = {name: int(chosen.sum()) for name, chosen in _classes(labels)}
    n = {f"positions {name}": count for name, count in positions.items()}
    n |= {f"sequences {name}": count for name, count in sequences.items()}
    return Estimate(auroc(scores, labels), _interval(scores, labels, sequence), n)


def _over_sequences(data: LabelledCodes, column: int, scores: Tensor) -> Estimate:
    """The AUROC of scores of sequences [n_sequences]."""
    labels = data.labels[:, column]
    n = {f"sequences {name}": int(chosen.sum()) for name, chosen in _classes(labels)}
    return Estimate(auroc(scores, labels), _interval(scores, labels, torch.arange(len(labels))), n)


def _classes(labels: Tensor) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    """Which rows are with the concept, and which without it: [n] each."""
    return ("with it", labels > 0.5), ("without it", labels <= 0.5)


def _interval(scores: Tensor, labels: Tensor, groups: Tensor) -> Interval | None:
    plain = [values.detach().double().cpu().numpy() for values in (scores, labels, groups)]
    return auroc_interval(plain[0], plain[1], plain[2])


def _by_chance(found: Estimate) -> str:
    """What is to be said of a latent's AUROC that is not above chance."""
    if found.interval is None or found.interval.low > 0.5:
        return ""
    low, high = found.interval
    if high < 0.5:
        return f"Below chance: its 95% interval ends at {high:.3g}, so the latent fires against the concept."
    return f"At chance: its 95% interval, {low:.3g} to {high:.3g}, includes 0.5."


def _warn_if_few(context: RunContext, data: LabelledCodes, column: int) -> None:
    """Say how many sequences the AUROCs of a concept were measured on, if they are few."""
    n = [int(chosen.sum()) for _, chosen in _classes(data.labels[:, column])]
    name = context.source.concepts[column]
    if min(n) == 0:
        context.warn(
            f"Every held-out sequence with a label {'has' if n[0] else 'lacks'} concept {name!r}, so only "
            "values over positions are defined. Add texts of the other kind for those over sequences."
        )
    elif min(n) < FEW:
        context.warn(
            f"Concept {name!r} was measured on {n[0]} held-out sequences with it and {n[1]} without "
            "it: too few for more than a rough AUROC (see the intervals). Raise concept_auroc's sequences and tokens, or label "
            "more texts."
        )


def _every(data: LabelledCodes, column: int, unit: str) -> Tensor:
    """The AUROC of every latent over tokens or sequences: [d_sae]."""
    d_sae = data.pooled_code.shape[1]
    if unit == "tokens":
        return auroc_of_latents(data.rows, data.latents, data.values, data.of_tokens(column)[data.some], d_sae)
    sequences, latents = data.pooled_code.nonzero(as_tuple=True)
    return auroc_of_latents(sequences, latents, data.pooled_code[sequences, latents], data.labels[:, column], d_sae)


def _yardsticks(train: LabelledCodes, held_out: LabelledCodes, column: int, fitted_on: Tensor, measured_on: Tensor) -> Values:
    """How well directions in the activations, fitted on training data, predict the concept."""
    labels = train.of_tokens(column)
    known = ~labels.isnan()
    found: Values = {}
    for name, fit in (("means", difference_of_means), ("probe", logistic)):
        scores = measured_on @ fit(fitted_on[known], labels[known]).to(measured_on)
        found[f"{name}_auroc_tokens"] = _over_tokens(held_out, column, scores)
        found[f"{name}_auroc_sequences"] = _over_sequences(held_out, column, held_out.pooled(scores))
    return found


def _rest(train: LabelledCodes, held_out: LabelledCodes, column: int, latent: int, sae: SparseAutoencoder) -> Values:
    """How well the reconstruction predicts the concept once the latent's part is taken out."""
    left = [part.rebuilt - part.columns[latent][:, None] * sae.W_dec[latent] for part in (train, held_out)]
    return {"rest_auroc_tokens": _yardsticks(train, held_out, column, *left)["probe_auroc_tokens"]}
