"""How much of a logit difference each latent is responsible for: by one gradient (`atp`), by several (`ig`), by trying (`exact`).

Integrated gradients account for the whole effect, which need not bring them nearer to the effects of single latents: far from
the data, where the way begins, the model does as it likes.

All three act on the same nodes: the latents active at the considered positions, and the SAE's error as a node of its own.
The undisturbed model computes with the original activation, so the SAE's error is never dropped (Marks et al. 2024,
"Sparse Feature Circuits", section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from saekit import OptionError, SparseAutoencoder, Subject, UsageError, is_out_of_memory
from saekit_attribution.effects.logit_difference import Above, frozen
from saekit_attribution.effects.nodes import Nodes, Positions, Reference, nodes_of
from saekit_attribution.labelled_data.samples import Sample

Method = Literal["atp", "ig", "exact"]
METHODS: tuple[Method, ...] = ("atp", "ig", "exact")


@dataclass(frozen=True)
class Attribution:
    """What one method says of one sample. Tensors are on the CPU; scores are logits.

    latents: [m] int64, ascending: those active at the considered positions (against "base" also those active only
    there). scores: [m], the part of `logit_diff` that the latent is responsible for; positive promotes the target.
    activations: [m], summed over the considered positions. gradients: [m], of the metric with respect to the latent (for
    ig their mean along the way; over several positions score / activation, 0 where that is not defined); None for exact.
    weighted: [m], the scores with the part of each activation that the base run lacks in its place, max(a - a_base, 0), where
    a_base is 0 at unaligned positions: what every answer needs is active in the base run too, and drops out. No effects any
    more; None for exact.
    error: the score of the SAE's error. logit_diff: logit(target) - logit(base) of the undisturbed model. moved: by how
    much that falls when everything is at its reference; what the scores of a complete method add up to, with `error`.
    """

    latents: Tensor
    scores: Tensor
    activations: Tensor
    gradients: Tensor | None
    weighted: Tensor | None
    error: float
    logit_diff: float
    moved: float


@dataclass(frozen=True)
class Refused:
    """A sample that has no attribution, and why."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """A sample on which the computation broke off. error: "OOM" or the exception's type. details: what it said."""

    error: str
    details: str


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
    on_error: Literal["raise", "keep"] = "raise",
) -> list[Outcome]:
    """For each sample, in order, what each of `methods` says of it, by the method's name.

    methods: "atp", activation x gradient (Nanda 2023, "Attribution patching"; on latents as in Marks et al. 2024, section
    3.1); "ig", integrated gradients (Sundararajan et al. 2017) from the reference to the activation, by the midpoint rule
    in `steps` steps; "exact", the metric less what it is with that one latent at its reference, one run for each.
    positions: "decisive", the last alone; "all", every one, at once for each latent (not a beginning-of-text token).
    reference: "zero", or "base": the base run's activations at aligned positions and zero elsewhere. A sample that is its
    own base is `Refused`.
    batch_tokens: tokens that go through the model at a time, halved where memory is short; samples of one length share a
    batch. on_error: "keep" gives `Failed` in the place of a sample that cannot be computed, and goes on.

    UsageError for options that mean nothing and for an SAE that does not fit the site.
    """
    _check(subject, sae, methods, positions, reference, steps, batch_tokens)
    outcomes: dict[int, Outcome] = {}
    for number, sample in enumerate(samples):
        if reference == "base" and sample.tokens == sample.base_tokens:
            outcomes[number] = Refused(
                "the base prompt is the same up to the differing token, so its activations are too: by causality there "
                "is no difference to attribute"
            )
        elif not sample.tokens or len(sample.aligned) != len(sample.tokens):
            outcomes[number] = Refused(
                f"malformed sample: {len(sample.tokens)} tokens, {len(sample.aligned)} of them aligned"
            )

    def compute(chosen: list[int]) -> list[Outcome]:
        batch = [samples[number] for number in chosen]
        return list(_batch(subject, sae, batch, methods, positions, reference, steps, batch_tokens))

    left = [number for number in range(len(samples)) if number not in outcomes]
    with subject.lock, frozen(subject.model), frozen(sae), torch.autocast(subject.device.type, enabled=False):
        for chosen in _batches(samples, left, batch_tokens):
            outcomes.update(_resilient(compute, chosen, on_error == "keep"))
    return [outcomes[number] for number in range(len(samples))]


def _batch(
    subject: Subject,
    sae: SparseAutoencoder,
    samples: list[Sample],
    methods: Sequence[str],
    positions: Positions,
    reference: Reference,
    steps: int,
    batch_tokens: int,
) -> Iterator[dict[str, Attribution]]:
    """The attributions of samples of one length."""
    above = Above(subject, samples, last=positions == "decisive", batch_tokens=batch_tokens)
    with torch.no_grad():
        nodes = nodes_of(subject, sae, samples, above, positions=positions, reference=reference)
    rows = torch.arange(len(samples), device=nodes.x.device)
    both = torch.stack([nodes.x, nodes.reference]).flatten(0, 1)
    plain, bare = above.metrics(rows.repeat(2), lambda some: both[some]).chunk(2)
    moved = plain - bare
    compute: dict[str, Callable[[], _Scores]] = {
        "atp": lambda: _linear(nodes, sae, above.gradient(rows, nodes.x)[1]),
        "ig": lambda: _linear(nodes, sae, _mean_gradient(above, nodes, rows, steps)),
        "exact": lambda: _exact(above, nodes, sae, rows, plain),
    }
    found = {method: compute[method]() for method in methods}
    counts = torch.bincount(nodes.node_rows, minlength=len(samples)).tolist()

    def split(values: Tensor | None) -> list[Any]:
        return [None] * len(samples) if values is None else list(values.detach().cpu().split(counts))

    latents, activations = split(nodes.node_latents), split(nodes.summed(nodes.values))
    differences, all_moved = plain.tolist(), moved.tolist()
    parts = {
        method: (split(of.scores), split(of.gradients), split(of.weighted), of.errors.tolist())
        for method, of in found.items()
    }
    for i in range(len(samples)):
        yield {
            method: Attribution(
                latents=latents[i],
                scores=scores[i],
                activations=activations[i],
                gradients=gradients[i],
                weighted=weighted[i],
                error=errors[i],
                logit_diff=differences[i],
                moved=all_moved[i],
            )
            for method, (scores, gradients, weighted, errors) in parts.items()
        }


class _Scores(NamedTuple):
    """What a method gives for all samples of a batch: see `Attribution`. scores, gradients, weighted: [M]. errors: [n]."""

    scores: Tensor
    gradients: Tensor | None
    weighted: Tensor | None
    errors: Tensor


def _linear(nodes: Nodes, sae: SparseAutoencoder, gradient: Tensor) -> _Scores:
    """By the metric's gradient [n, P, d] at the site.

    A latent's gradient is the site's times its decoder row: forward the original activation, backward the decoder."""
    gradient = gradient.to(nodes.x.dtype)
    products = nodes.products(gradient, sae.W_dec)
    scores = nodes.summed(nodes.deltas * products)
    activations = nodes.summed(nodes.values)
    one = nodes.summed(torch.ones_like(products)) == 1
    ratio = torch.where(activations == 0, 0.0, scores / activations)
    gradients = torch.where(one, nodes.summed(products), ratio)
    return _Scores(scores, gradients, nodes.summed(nodes.excess * products), (gradient * nodes.error).sum((1, 2)))


def _mean_gradient(above: Above, nodes: Nodes, rows: Tensor, steps: int) -> Tensor:
    """The mean gradient on the straight line from the reference to the activation, by the midpoint rule: [n, P, d].

    The decoder is linear, so it is also the straight line of the latents and the error."""
    total = torch.zeros_like(nodes.x)
    for step in range(steps):
        share = (step + 0.5) / steps
        total += above.gradient(rows, nodes.reference + share * (nodes.x - nodes.reference))[1]
    return total / steps


def _exact(above: Above, nodes: Nodes, sae: SparseAutoencoder, rows: Tensor, plain: Tensor) -> _Scores:
    """The true effects of replacing one latent by its reference, [M], and of replacing the error, [n]."""
    changing = nodes.summed((nodes.deltas != 0).long()).nonzero().flatten()  # the others are at their reference already
    of = nodes.node_rows[changing]
    without = above.metrics(of, lambda some: nodes.without(changing[some], sae.W_dec))
    scores = plain.new_zeros(len(nodes.node_rows)).index_copy(0, changing, plain[of] - without)
    errors = plain - above.metrics(rows, lambda some: nodes.x[some] - nodes.error[some])
    return _Scores(scores, None, None, errors)


def _batches(samples: Sequence[Sample], numbers: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of samples of one length, with at most `batch_tokens` tokens, or one sample."""
    lengths: dict[int, list[int]] = {}
    for number in numbers:
        lengths.setdefault(len(samples[number].tokens), []).append(number)
    for length, chosen in sorted(lengths.items()):
        count = math.ceil(len(chosen) / max(1, batch_tokens // length))
        for part in range(count):  # of one size, rather than a small one at the end
            yield chosen[part * len(chosen) // count : (part + 1) * len(chosen) // count]


def _resilient(
    compute: Callable[[list[int]], list[Outcome]], chosen: list[int], keep: bool
) -> Iterator[tuple[int, Outcome]]:
    """The outcomes by number. A batch for which memory is short is halved; with `keep`, one that fails otherwise too."""
    problem: Failed | None = None
    try:
        found = compute(chosen)
    except UsageError:
        raise
    except Exception as error:
        short = is_out_of_memory(error)
        if not keep and not (short and len(chosen) > 1):
            raise
        problem = Failed("OOM" if short else type(error).__name__, str(error))
    if problem is None:
        yield from zip(chosen, found, strict=True)
    elif len(chosen) == 1:
        yield chosen[0], problem
    else:  # outside the handler, where the error would keep the batch's tensors alive
        if problem.error == "OOM" and torch.cuda.is_available():
            torch.cuda.empty_cache()
        for half in (chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]):
            yield from _resilient(compute, half, keep)


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
        raise UsageError(f"{where}: the SAE is a transcoder, which rebuilds another site. Attribute with an SAE.")
    if type(sae).decode is not SparseAutoencoder.decode:
        raise UsageError(
            f"{where}: the decoder of {type(sae).__name__} is more than a product with W_dec, so a latent has no one "
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
