"""Latents that detect each entity to be forgotten, at the last token of its name, by logistic regression.

One probe for each entity, against everything else. With z = L^T (x - mean) whitened within entities, where L L^T is the inverse
of the covariance of activations at the ends of names about the mean of their entity (plus `SHRINKAGE` of its mean variance),

    score_j(x) = z . w_j + b_j;   minimise mean_i c_i BCE(score_j(x_i), y_ij) + l2 |w_j|^2      (summed over entities j)

with weight c = `names` at the end of any name and wherever an earlier fit fired by mistake, and 1 at other positions. What varies
between wordings of one name is thus small from the start, as in linear discriminant analysis (Hastie, Tibshirani and Friedman
2009, sections 4.3 and 4.4). Scores are then divided by their mean at the entity's own name, and a detector fires above its
threshold: its lowest score on its own texts less a margin. Margin and l2 are chosen by leaving out wordings and entities in turn.

Two aids take nothing that is not given. Names that nobody has, halves of the forget entities' names put together anew in the same
texts: a detector that were content with half a name would fire on them. And every name after the beginnings of general texts,
so that no detector learns a wording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from saekit import UsageError
from saekit_unlearning.data import FORGET, Text, UnlearningData
from saekit_unlearning.passages import Site
from saekit_unlearning.places import batches, placed

L2 = (3e-5, 3e-4)
MARGINS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
SHRINKAGE = 0.01
LONGEST = 80  # characters of a general text before a name
LOWEST = 0.05
"""No threshold is below it, so that no detector fires where its score is negative."""


@dataclass(frozen=True)
class Detectors:
    """One detector for each of `entities`; they fire where their score exceeds their threshold.

    weight: [d, n]. bias, threshold: [n]. At its own name each score is 1 on average.
    """

    entities: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    threshold: Tensor

    def scores(self, x: Tensor) -> Tensor:
        """[m, d] -> [m, n]."""
        return x @ self.weight.to(x) + self.bias.to(x)

    def __call__(self, x: Tensor) -> Tensor:
        """By how much each score exceeds its threshold, 0 where it does not: [m, d] -> [m, n]."""
        return (self.scores(x) - self.threshold.to(x)).relu()


@dataclass(frozen=True)
class Examples:
    """Activations to fit detectors to.

    names: [m, d], at the ends of names. owner: [m], the number of the entity in `entities`, -1 for names that must not be
        detected. who: [m], the entity, or the made-up name. given: [m], False for the aids, which are not counted.
    background: [b, d], at all other positions.
    """

    entities: tuple[str, ...]
    names: Tensor
    owner: Tensor
    who: np.ndarray
    given: np.ndarray
    background: Tensor


def recombined(texts: Sequence[Text], seed: int, n: int) -> list[Text]:
    """`n` of the texts about things to forget, with a name that begins like one entity's and ends like another's."""
    forget = [text for text in texts if text.group == FORGET]
    names = {text.entity: text.text[slice(*text.name)] for text in forget}
    draws, found = np.random.default_rng(seed), list[Text]()
    entities = sorted(names)
    if len(entities) < 2:
        return []
    while len(found) < n:
        text = forget[draws.integers(len(forget))]
        own, other = names[text.entity], names[entities[draws.integers(len(entities))]]
        if draws.random() < 0.5:
            own, other = other, own
        name = own[: (len(own) + 1) // 2] + other[len(other) // 2 :]
        if name in names.values():
            if len(set(names.values())) == 1:
                return []
            continue
        (start, end), by = text.name, len(name) - (text.name[1] - text.name[0])
        answer = tuple(at + by if at >= end else at for at in text.answer)
        found.append(
            replace(
                text,
                text=text.text[:start] + name + text.text[end:],
                group="recombined",
                entity=name,
                name=(start, start + len(name)),
                answer=answer,  # type: ignore[arg-type]
            )
        )
    return found


def in_contexts(texts: Sequence[Text], contexts: Sequence[str], seed: int, n: int) -> list[Text]:
    """For each entity of `texts`, `n` texts that end with its name, after the beginning of a text of `contexts`."""
    draws, found = np.random.default_rng(seed), list[Text]()
    for text in {text.entity: text for text in texts}.values():
        name = text.text[slice(*text.name)]
        for _ in range(n):
            words = contexts[int(draws.integers(len(contexts)))][:LONGEST].split(" ")
            before = " ".join(words[: draws.integers(1, len(words) + 1)]) + " "
            span = (len(before), len(before) + len(name))
            found.append(Text(before + name, text.group, text.entity, span, span))
    return found


@torch.no_grad()
def examples(
    site: Site, texts: Sequence[Text], aids: Sequence[Text], general: Sequence[Sequence[int]], size: int = 64
) -> Examples:
    """The activations of texts, about things to forget and others, of aids beside them, and of rows of tokens."""
    entities = tuple(sorted({text.entity for text in texts if text.group == FORGET}))
    if not entities:
        raise UsageError("there is no text of anything to forget, so nothing can be detected.")
    names, background, who, given = list[Tensor](), list[Tensor](), list[str](), list[bool]()
    for some in (texts, aids):
        every = [placed(site.subject.tokenizer, text, whole=True) for text in some]
        for batch in batches(site, sorted(every, key=lambda one: len(one.tokens)), size):
            x, here = batch.passages.x, batch.at_names
            names.append(x[here])
            background.append(x[~here])
            who += [text.entity for text in batch.texts]
            given += [some is texts] * len(batch.texts)
    background += [passages.x for passages in site.passages(general)]
    index = {entity: i for i, entity in enumerate(entities)}
    owner = torch.tensor([index.get(entity, -1) for entity in who], device=names[0].device)
    return Examples(entities, torch.cat(names), owner, np.array(who), np.array(given), torch.cat(background))


def fit(
    data: Examples, *, l2: float, margin: float, names: float = 200.0, background: int = 6000, rounds: int = 5
) -> Detectors:
    """The detectors of `data`.

    names: the weight of the end of a name, against 1 for another position.
    background: other positions drawn for the first fit; those on which a detector fires by mistake join in each later of the
        `rounds`, with the weight of a name.
    """
    whiten, mean = _within_entities(data), data.background.mean(0)
    own, others = (data.names - mean) @ whiten, (data.background - mean) @ whiten  # [m, d], [b, d]
    order = np.random.default_rng(0).permutation(len(others))[:background]
    drawn = others[torch.from_numpy(order).to(own.device)]
    mistaken, w, b = torch.zeros(len(others), dtype=torch.bool, device=own.device), None, None
    for _ in range(rounds):
        w, b = _regression([own, others[mistaken], drawn], data, l2, names, w, b)
        found = _standardised(own, data, w, b, margin)
        new = (found.scores(others) > found.threshold).any(1) & ~mistaken
        if not bool(new.any()):
            break
        mistaken |= new
    return replace(found, weight=whiten @ found.weight, bias=found.bias - mean @ (whiten @ found.weight))


def _within_entities(data: Examples) -> Tensor:
    """L [d, d], which makes the covariance of names about their entity's mean the identity."""
    several = [data.who == who for who in set(data.who.tolist())]
    groups = [data.names[torch.from_numpy(rows).to(data.names.device)] for rows in several if rows.sum() > 1]
    centred = torch.cat([group - group.mean(0) for group in groups]) if groups else torch.zeros_like(data.names[:1])
    covariance = centred.T @ centred / max(len(centred), 1)  # [d, d]
    # A name that is one token has no variance of its own right after the embedding.
    floor = torch.maximum(SHRINKAGE * covariance.diagonal().mean(), 1e-3 * data.names.var(0).mean())
    covariance.diagonal().add_(floor)
    return torch.linalg.cholesky(torch.linalg.inv(covariance))


def _regression(
    parts: Sequence[Tensor], data: Examples, l2: float, names: float, w: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(w [d, n], b [n]) from an earlier fit or from zero. parts: names, mistaken positions and others, each [., d]."""
    z, n = torch.cat([*parts]), len(data.entities)
    y, cost = z.new_zeros(len(z), n), z.new_full((len(z), 1), names)
    mine = (data.owner >= 0).nonzero()[:, 0]
    y[mine, data.owner[mine]] = 1.0
    cost[len(z) - len(parts[-1]) :] = 1.0
    w = (z.new_zeros(z.shape[1], n) if w is None else w.clone()).requires_grad_(True)
    b = (z.new_full((n,), -3.0) if b is None else b.clone()).requires_grad_(True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=60, line_search_fn="strong_wolfe", history_size=10)

    def loss() -> Tensor:
        optimizer.zero_grad()
        each = binary_cross_entropy_with_logits(z @ w + b, y, reduction="none")  # [m + b, n]
        value = (cost * each).sum(1).mean() + l2 * w.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return w.detach(), b.detach()


def _standardised(own: Tensor, data: Examples, w: Tensor, b: Tensor, margin: float) -> Detectors:
    """Scores of mean 1 at the entity's own name, and their thresholds."""
    mine = (data.owner >= 0).nonzero()[:, 0]
    of = data.owner[mine]  # [own names]
    scores = (own[mine] @ w + b).gather(1, of[:, None])[:, 0]
    mean = scores.new_zeros(len(b)).scatter_reduce(0, of, scores, "mean", include_self=False).clamp_min(1e-6)
    lowest = scores.new_zeros(len(b)).scatter_reduce(0, of, scores, "amin", include_self=False) / mean
    return Detectors(data.entities, w / mean, b / mean, (lowest - margin).clamp_min(LOWEST))


@dataclass(frozen=True)
class Choice:
    """What was found by leaving out, for one pair of settings: the share of left-out texts that their own detector detects, and
    of the texts of left-out entities, which are to stay, on which any detector fires."""

    l2: float
    margin: float
    detected: float
    false: float


def choices(data: Examples, *, folds: int = 5, seed: int = 0, l2: Sequence[float] = L2) -> list[Choice]:
    """Every pair of settings, tried on what its detectors were not fitted to: a part of the texts about each thing to forget, and
    all texts of a part of the other names."""
    draws = np.random.default_rng(seed)
    others = sorted(set(data.who[data.owner.cpu().numpy() < 0].tolist()))
    fold_of = {who: i % folds for i, who in enumerate(draws.permutation(others).tolist())}
    fold = np.array([fold_of.get(who, 0) for who in data.who.tolist()])
    for number in range(len(data.entities)):  # other entities' texts still have the wording, as they have an unseen one
        mine = (data.owner.cpu().numpy() == number).nonzero()[0]
        fold[mine] = (draws.permutation(len(mine)) + draws.integers(folds)) % folds
    counts = {(strength, margin): np.zeros(4) for strength in l2 for margin in MARGINS}
    for left_out in range(folds):
        out, rest = fold == left_out, fold != left_out
        kept = torch.from_numpy(rest).to(data.names.device)
        fitted = replace(
            data, names=data.names[kept], owner=data.owner[kept], who=data.who[rest], given=data.given[rest]
        )
        asked = torch.from_numpy(out & data.given).to(data.names.device)
        owner = data.owner[asked]
        wanted = owner >= 0
        for strength in l2:
            detectors = fit(fitted, l2=strength, margin=0.0, rounds=1)
            scores = detectors.scores(data.names[asked])
            for margin in MARGINS:
                fired = scores > (detectors.threshold - margin).clamp_min(LOWEST)
                own = fired.gather(1, owner.clamp_min(0)[:, None])[:, 0] & wanted
                found = (own.sum(), wanted.sum(), (fired.any(1) & ~wanted).sum(), (~wanted).sum())
                counts[strength, margin] += [float(n) for n in found]
    return [
        Choice(strength, margin, float(c[0] / max(c[1], 1)), float(c[2] / max(c[3], 1)))
        for (strength, margin), c in counts.items()
    ]


def chosen(tried: Sequence[Choice]) -> Choice:
    """The settings with the largest detected * (1 - false): the score (1 - f) r of an edit that takes every fact whose name is
    detected."""
    return max(tried, key=lambda one: (one.detected * (1 - one.false), -one.false))


def detectors_for(
    site: Site, data: UnlearningData, general: Sequence[str], *, seed: int = 0, width: int = 128
) -> tuple[Detectors, list[Choice]]:
    """The detectors of all that `data` wants forgotten, with the settings that were tried.

    general: texts about other things, of which the first `width` tokens are used, all of them as background."""
    texts, tokenizer = [*data.forget, *data.retain], site.subject.tokenizer
    made_up = recombined(texts, seed, 2 * len(data.forget))
    aids = [*made_up, *in_contexts(texts, general, seed, 8), *in_contexts(made_up, general, seed + 1, 1)]
    rows = [tokenizer(text, verbose=False)["input_ids"][:width] for text in general]
    found = examples(site, texts, aids, rows)
    tried = choices(found, seed=seed)
    best = chosen(tried)
    return fit(found, l2=best.l2, margin=best.margin), tried
