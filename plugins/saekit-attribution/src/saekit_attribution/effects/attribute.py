"""`attribute`: the scores of each latent for a list of samples, batch by batch, with failures kept apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from saekit import OptionError, SparseAutoencoder, Subject, UsageError
from saekit_attribution.effects.batching import Failed, batches, resilient
from saekit_attribution.effects.logit_difference import frozen
from saekit_attribution.effects.methods import METHODS, Attribution, batch_attributions
from saekit_attribution.effects.nodes import Positions, Reference
from saekit_attribution.labelled_data.teacher_forcing import Sample


@dataclass(frozen=True)
class Refused:
    """A sample that has no attribution, and why."""

    reason: str


Outcome = dict[str, Attribution] | Refused | Failed


def attribute(
    subject: Subject,
    sae: SparseAutoencoder,
    samples: Sequence[Sample],
    *,
    methods: Sequence[str] = ("atp",),
    positions: Positions = "decisive",
    reference: Reference = "zero",
    steps: int = 8,
    batch_tokens: int = 4096,
    per_position: int = 0,
    on_error: Literal["raise", "keep"] = "raise",
) -> list[Outcome]:
    """For each sample, in order, the `Attribution` by each of `methods`, keyed by the method's name.

    methods: "atp", activation x gradient (Nanda 2023, "Attribution patching"; on latents as in Marks et al. 2024,
        section 3.1); "ig", integrated gradients (Sundararajan et al. 2017) from the reference to the activation, by the
        midpoint rule in `steps` steps; "exact", the metric minus its value with that one latent at its reference, one
        run for each latent.
    positions: "decisive", the last alone; "all", every position at once (but not a beginning-of-text token).
    reference: "zero", or "base": the base run's activations at aligned positions and zero elsewhere. A sample whose
        prompt equals its base prompt is `Refused`.
    batch_tokens: tokens that go through the model at a time, halved when memory runs out; samples of equal length share a batch.
    per_position: latents in each of `Attribution.by_position`; 0 leaves it out.
    on_error: "keep" puts `Failed` in the place of a sample that cannot be computed, and continues.

    UsageError for an option outside its range and for an SAE that does not fit the site.
    """
    _check(subject, sae, methods, positions, reference, steps, batch_tokens)
    outcomes: dict[int, Outcome] = {}
    for number, sample in enumerate(samples):
        if reference == "base" and sample.tokens == sample.base_tokens:
            outcomes[number] = Refused(
                "the base prompt is the same up to the differing token, and by causality so are its activations: there is "
                "no difference to attribute"
            )
        elif not sample.tokens or len(sample.aligned) != len(sample.tokens):
            outcomes[number] = Refused(
                f"malformed sample: {len(sample.tokens)} tokens, {len(sample.aligned)} of them aligned"
            )

    def compute(chosen: list[int]) -> list[Outcome]:
        batch = [samples[number] for number in chosen]
        return list(
            batch_attributions(subject, sae, batch, methods, positions, reference, steps, batch_tokens, per_position)
        )

    left = [number for number in range(len(samples)) if number not in outcomes]
    with subject.lock, frozen(subject.model), frozen(sae), torch.autocast(subject.device.type, enabled=False):
        for chosen in batches(samples, left, batch_tokens):
            outcomes.update(resilient(compute, chosen, on_error == "keep"))
    return [outcomes[number] for number in range(len(samples))]


def _check(
    subject: Subject,
    sae: SparseAutoencoder,
    methods: Sequence[str],
    positions: str,
    reference: str,
    steps: int,
    batch_tokens: int,
) -> None:
    for name, given, allowed in (
        *(("methods", method, METHODS) for method in methods),
        ("positions", positions, ("decisive", "all")),
        ("reference", reference, ("zero", "base")),
    ):
        if given not in allowed:
            raise OptionError(name, f"there is no {given!r}. Choose from {', '.join(map(repr, allowed))}.")
    for name, number in (("steps", steps), ("batch_tokens", batch_tokens)):
        if number < 1 or not math.isfinite(number):
            raise OptionError(name, f"must be 1 or more, not {number}.")
    where = f"hook point {subject.site.name!r}"
    if sae.transcoder:
        raise UsageError(f"{where}: the SAE is a transcoder, which reconstructs another site. Attribute with an SAE.")
    if type(sae).decode is not SparseAutoencoder.decode:
        raise UsageError(
            f"{where}: the decoder of {type(sae).__name__} is more than a product with W_dec, so a latent has no single "
            "direction to attribute to. Attribute with another architecture."
        )
    if sae.W_dec.device != subject.device:
        raise UsageError(
            f"{where}: the model is on {subject.device} and the SAE on {sae.W_dec.device}. "
            f"Move the SAE: sae.to({str(subject.device)!r})."
        )
    if (width := subject.width()) != sae.d_in:
        raise UsageError(
            f"{where}: the activation is {width} wide and the SAE reads {sae.d_in}. Take the SAE of this site."
        )
