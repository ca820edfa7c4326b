"""What a set of latents does together: without it, with it alone, and with it put into the base run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saekit import SparseAutoencoder, Subject
from saekit_attribution.effects.batching import Failed, batches, resilient
from saekit_attribution.effects.logit_difference import LogitDifference, frozen
from saekit_attribution.effects.nodes import Nodes, Positions, Reference, nodes_of
from saekit_attribution.labelled_data.teacher_forcing import Sample

_CHANGED = 1 << 24  # numbers in a temporary of `_change`


@dataclass(frozen=True)
class SetEffects:
    """The effects of `s` sets in one sample, in logits of the metric. The SAE's error stays as it is in each run.

    whole: how far the metric falls when all latents are at their reference.
    removed: [s], how far it falls when those of the set are (necessity).
    kept: [s], how far the set alone, all other latents at their reference, raises it above that of no latent
        (sufficiency; Marks et al. 2024, section 3.2, call its share faithfulness).
    gap: how far the metric of the base run lies below.
    put_in: [s], how far the base run's metric rises when the set's latents have the values of this run there, at aligned
        positions.
    all_put_in: the same of all latents; what is missing to `gap` is in the error, or at positions that only this prompt has.

    What is put into the base run is None where that is the same run, or no position considered is aligned with one of it.
    In every model `removed` of a set and `kept` of all other latents add up to `whole`; in a linear one, `removed` equals `kept`.
    """

    whole: float
    removed: list[float]
    kept: list[float]
    gap: float | None
    put_in: list[float] | None
    all_put_in: float | None


def set_effects(
    subject: Subject,
    sae: SparseAutoencoder,
    samples: Sequence[Sample],
    sets: Sequence[Sequence[int]],
    *,
    positions: Positions = "decisive",
    reference: Reference = "zero",
    batch_tokens: int = 4096,
) -> list[SetEffects | Failed]:
    """The effects of `sets` of latents in each of `samples`, in their order. A sample that fails costs its own effects alone.

    positions, reference, batch_tokens: as for `attribute`, which refuses an SAE that cannot be used.
    """

    def compute(chosen: list[int]) -> list[SetEffects | Failed]:
        batch = [samples[number] for number in chosen]
        return list(_of_batch(subject, sae, batch, sets, positions, reference, batch_tokens))

    found: dict[int, SetEffects | Failed] = {}
    with subject.lock, frozen(subject.model), frozen(sae), torch.autocast(subject.device.type, enabled=False):
        for chosen in batches(samples, range(len(samples)), batch_tokens, with_base=True):
            found.update(resilient(compute, chosen, keep=True))
    return [found[number] for number in range(len(samples))]


@torch.no_grad()
def _of_batch(
    subject: Subject,
    sae: SparseAutoencoder,
    samples: list[Sample],
    sets: Sequence[Sequence[int]],
    positions: Positions,
    reference: Reference,
    batch_tokens: int,
) -> list[SetEffects]:
    """The same for samples of equal length whose base prompts are of equal length."""
    n, last = len(samples), positions == "decisive"
    metric = LogitDifference(subject, samples, last=last, batch_tokens=batch_tokens)
    nodes = nodes_of(subject, sae, samples, metric, positions=positions, reference=reference)
    rows = torch.arange(n, device=nodes.x.device)
    none = nodes.reference + nodes.error  # all latents at their reference
    both = torch.stack([nodes.x, none]).flatten(0, 1)
    plain, bare = metric.values(rows.repeat(2), lambda some: both[some]).chunk(2)

    row, which = (t.flatten() for t in torch.meshgrid(rows, torch.arange(len(sets), device=rows.device), indexing="ij"))
    member = _membership(nodes, sets)

    def change(some: Tensor) -> Tensor:
        return _change(nodes, row[some], member[which[some]], nodes.positions, nodes.x.shape[1], sae.W_dec)

    removed = plain[row] - metric.values(row, lambda some: nodes.x[row[some]] - change(some))
    kept = metric.values(row, lambda some: none[row[some]] + change(some)) - bare[row]
    removed_of, kept_of = (values.view(n, len(sets)).tolist() for values in (removed, kept))
    whole = (plain - bare).tolist()
    into_base = _into_base(subject, sae, samples, sets, metric, plain, positions, batch_tokens)
    return [SetEffects(whole[i], removed_of[i], kept_of[i], *into_base[i]) for i in range(n)]


_IntoBase = tuple[float | None, list[float] | None, float | None]


def _into_base(
    subject: Subject,
    sae: SparseAutoencoder,
    samples: list[Sample],
    sets: Sequence[Sequence[int]],
    metric: LogitDifference,
    plain: Tensor,
    positions: Positions,
    batch_tokens: int,
) -> list[_IntoBase]:
    """`gap`, `put_in` and `all_put_in` of each sample."""
    usable = [_can_be_put_in(sample, positions) for sample in samples]
    found: list[_IntoBase] = [(None, None, None)] * len(samples)
    if not any(usable):
        return found
    based = [replace(s, tokens=s.base_tokens, aligned=(-1,) * len(s.base_tokens)) for s in samples]
    base = LogitDifference(subject, based, last=positions == "decisive", batch_tokens=batch_tokens)
    nodes = nodes_of(subject, sae, samples, metric, positions=positions, reference="base")
    rows = torch.tensor([i for i, use in enumerate(usable) if use], device=nodes.x.device)
    x = base.activation[:, base.offset :].to(nodes.x.dtype)
    aligned = torch.tensor([s.aligned for s in samples], device=x.device)
    at = aligned[nodes.rows, nodes.positions + metric.offset] - base.offset  # [E], negative where there is none
    member = torch.cat([_membership(nodes, sets), torch.ones(1, len(at), dtype=torch.bool, device=x.device)]) & (at >= 0)
    row, which = (t.flatten() for t in torch.meshgrid(rows, torch.arange(len(member), device=x.device), indexing="ij"))

    def put_in(some: Tensor) -> Tensor:
        return x[row[some]] + _change(nodes, row[some], member[which[some]], at, x.shape[1], sae.W_dec)

    before = base.values(rows, lambda some: x[rows[some]])
    risen = (base.values(row, put_in).view(len(rows), -1) - before[:, None]).tolist()
    gaps = (plain[rows] - before).tolist()
    for i, gap, values in zip(rows.tolist(), gaps, risen, strict=True):
        found[i] = gap, values[:-1], values[-1]
    return found


def _can_be_put_in(sample: Sample, positions: Positions) -> bool:
    places = sample.aligned if positions == "all" else sample.aligned[-1:]
    return sample.tokens != sample.base_tokens and len(sample.base_tokens) > 0 and any(place >= 0 for place in places)


def _membership(nodes: Nodes, sets: Sequence[Sequence[int]]) -> Tensor:
    """Which entries are of which set: [s, E]."""
    members = [torch.isin(nodes.latents, torch.tensor(list(chosen), device=nodes.latents.device)) for chosen in sets]
    return torch.stack(members) if members else nodes.latents.new_zeros(0, len(nodes.latents), dtype=torch.bool)


def _change(nodes: Nodes, rows: Tensor, member: Tensor, at: Tensor, width: int, decoder: Tensor) -> Tensor:
    """What some entries of the samples `rows` [m] add to an activation: [m, width, d].

    member: [m, E]. at: [E], the position that each entry goes to."""
    which, entries = (member & (nodes.rows == rows[:, None])).nonzero(as_tuple=True)
    change = nodes.x.new_zeros(len(rows), width, decoder.shape[1])
    step = max(1, _CHANGED // decoder.shape[1])
    for of, e in zip(which.split(step), entries.split(step), strict=True):
        parts = nodes.deltas[e, None] * decoder[nodes.latents[e]]
        change.index_put_((of, at[e]), parts.to(change.dtype), accumulate=True)
    return change
