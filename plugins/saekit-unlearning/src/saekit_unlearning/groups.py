"""The callback `groups`: latents whose activations rise and fall together, followed through training."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from saekit_graph.clusters import LARGEST, Pairs, agglomerative, correlated_pairs
from saekit_graph.window import Window

from saekit import Result, Training, hookimpl

CHANCE = 3.0
"""How many standard deviations of independent latents' correlation a threshold is at least."""


@dataclass(frozen=True)
class Grouping:
    """Groups of latents, the largest first.

    group: [latents], the number of each latent's group, -1 for none. cluster: the same for clusters of groups.
    threshold: the percentile of the pairs. applied: what was applied, not below it: see `grouped`.
    """

    group: np.ndarray
    cluster: np.ndarray
    threshold: float
    applied: float


def grouped(pairs: Pairs, *, percentile: float, minimum: int, clusters: int | None = None) -> Grouping:
    """Groups of at least `minimum` latents whose mean correlation, pair by pair, exceeds a percentile of the pairs'.

    Average linkage within each connected component of the graph of the pairs above the threshold; other pairs count as 0. The
    threshold is at least 3 / sqrt(tokens), three times what two independent latents correlate by chance, and rises until no
    component has more than 4,096 latents. Groups are then joined into `clusters` by the same linkage
    over the mean correlation between them.
    """
    nowhere = np.full(pairs.latents, -1, dtype=np.int64)
    if not len(pairs):
        return Grouping(nowhere, nowhere, float("nan"), float("nan"))
    threshold = pairs.percentile(percentile)
    applied = _bounded(pairs, max(threshold, CHANCE / pairs.tokens**0.5))
    kept = pairs.above(applied)
    weights = kept.matrix()
    found: list[np.ndarray] = []
    for latents in kept.components():
        if len(latents) >= minimum:
            of = agglomerative(weights[latents][:, latents], above=applied)
            found += [members for c in range(of.max() + 1) if len(members := latents[of == c]) >= minimum]
    found.sort(key=lambda members: (-len(members), members[0]))
    group = nowhere.copy()
    for number, members in enumerate(found):
        group[members] = number
    return Grouping(group, _joined(weights, group, len(found), clusters), threshold, applied)


def _bounded(pairs: Pairs, threshold: float) -> float:
    """The smallest threshold, not below the given one, above which no component is too large."""

    def fits(value: float) -> bool:
        return max(map(len, forest.above(value).components()), default=0) <= LARGEST

    forest = pairs.above(threshold).spanning_forest()
    if fits(threshold):
        return threshold
    values = np.unique(forest.weight)
    return float(values[bisect.bisect_left(range(len(values)), True, key=lambda i: fits(float(values[i])))])


def _joined(weights: Any, group: np.ndarray, groups: int, clusters: int | None) -> np.ndarray:
    """Each latent's cluster of groups, -1 for none; the group itself if there are not more groups than clusters."""
    if clusters is None or groups <= clusters:
        return group.copy()
    from scipy.sparse import csr_matrix

    groups = min(groups, LARGEST)  # the largest of them
    inside = np.flatnonzero((group >= 0) & (group < groups))
    member = csr_matrix((np.ones(len(inside)), (inside, group[inside])), shape=(len(group), groups))
    sizes = np.asarray(member.sum(0)).ravel()
    between = (member.T @ weights @ member).toarray() / np.outer(sizes, sizes)  # [groups, groups]
    of = agglomerative(between, clusters=clusters)
    return np.where((group >= 0) & (group < groups), of[np.clip(group, 0, groups - 1)], -1)


class Groups:
    """Groups of latents by the correlation of their activations, found anew every `every` steps.

    The correlations are Pearson's over the codes of the last `batches` steps, zeros included, of every two latents that fire
    together; no [d_sae, d_sae] matrix is held. The threshold is a percentile of these pairs, and at least what independent
    latents reach by chance (3 / sqrt(activations)). Within the graph of the pairs above it, average linkage joins latents while
    their mean correlation exceeds the threshold; groups of fewer than `minimum` are dropped. With `clusters`, groups are joined
    further until there are so many, and losses see the clusters.

    Losses see them as `step.provided["groups"]`.
    """

    def __init__(
        self,
        *,
        every: Annotated[int, Field(gt=0, description="Steps between two looks at the correlations.")] = 100,
        batches: Annotated[int, Field(gt=0, description="How many of the last steps' codes are looked at.")] = 8,
        percentile: Annotated[
            float, Field(ge=0, lt=100, description="The percentile of co-active pairs that a correlation must exceed.")
        ] = 75.0,
        minimum: Annotated[int, Field(gt=1, description="The fewest latents of a group.")] = 5,
        clusters: Annotated[
            int | None, Field(gt=0, description="Join the groups into so many clusters; by default they stay apart.")
        ] = None,
        least: Annotated[int, Field(gt=1, description="How often a latent must have fired to take part.")] = 10,
    ) -> None:
        self.every, self.batches, self.percentile = every, batches, percentile
        self.minimum, self.clusters, self.least = minimum, clusters, least
        self.window = Window()
        self.history: list[dict[str, Any]] = []
        self.group: torch.Tensor | None = None  # [d_sae]
        self.cluster: torch.Tensor | None = None  # [d_sae]

    @hookimpl
    def training_started(self, trainer: Training) -> None:
        """A resumed run goes on with the groups and codes of its checkpoint."""
        self.window.to(trainer.device)
        self._provide(trainer)

    @hookimpl
    def step_ended(self, trainer: Training, number: int) -> None:
        """Keep the step's code if it is soon looked at, and look when it is time."""
        left = -(number + 1) % self.every
        if left < self.batches:
            self.window.keep(trainer.step.code)
        if left == 0:
            self.find(trainer, number + 1)

    def find(self, trainer: Training, done: int) -> None:
        """Find the groups now, after `done` steps."""
        d_sae = trainer.sae.d_sae
        pairs = correlated_pairs(self.window.codes(d_sae), d_sae, least=self.least)
        self.window.clear()
        found = grouped(pairs, percentile=self.percentile, minimum=self.minimum, clusters=self.clusters)
        groups, before = torch.from_numpy(found.group), self.group
        self.group, self.cluster = groups, torch.from_numpy(found.cluster)
        sizes = groups[groups >= 0].bincount()
        self.history.append(
            {
                "step": done,
                "tokens": pairs.tokens,
                "pairs": len(pairs),
                "threshold": found.threshold if len(pairs) else None,
                "applied": found.applied if len(pairs) else None,
                "groups": len(sizes),
                "clusters": int(self.cluster.max()) + 1,
                "grouped": int(sizes.sum()),
                "largest": int(sizes.max()) if len(sizes) else 0,
                "agreement": _agreement(before, groups),
            }
        )
        if not len(sizes):
            trainer.warn(
                f"groups: no {self.minimum} latents have a mean correlation above the threshold after {done} steps. Lower "
                "`minimum` or `percentile`, or give it more `batches`."
            )
        self._provide(trainer)

    def _provide(self, trainer: Training) -> None:
        if self.cluster is not None:
            trainer.provided["groups"] = self.cluster.to(trainer.device)

    def measures(self, trainer: Training) -> dict[str, float]:
        """What was found last: threshold, groups, how many latents are in one, how far they agree with those before."""
        if not self.history:
            return {}
        names = ("threshold", "applied", "groups", "grouped", "agreement")
        return {name: self.history[-1][name] for name in names if self.history[-1][name] is not None}

    def result(self) -> Result:
        """tables: members (latent, group, cluster), history (a row for each time)."""
        if not self.history or self.group is None or self.cluster is None:
            return Result(notes=[f"Training ended before step {self.every}, when groups would have been found."])
        last = {name: value for name, value in self.history[-1].items() if name not in ("step", "tokens")}
        inside = (self.group >= 0).nonzero().squeeze(1)
        order = inside[self.group[inside].argsort(stable=True)]
        columns = (order.tolist(), self.group[order].tolist(), self.cluster[order].tolist())
        members = [{"latent": j, "group": g, "cluster": c} for j, g, c in zip(*columns, strict=True)]
        notes = []
        if not len(inside):
            notes.append(f"No {self.minimum} latents have a mean correlation above the threshold: there is no group.")
        if last["threshold"] is not None and last["applied"] > last["threshold"]:
            notes.append(
                f"{last['applied']:.3g} was applied in place of the threshold, which independent latents exceed by chance in "
                f"{self.history[-1]['tokens']:,} activations, or above which more than {LARGEST:,} latents are connected."
            )
        return Result(
            scalars=last,
            tables={"members": members, "history": list(self.history)},
            figures={"history": _figure(self.history)},
            notes=notes,
            headline=["groups", "threshold"],
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the groups, their history, and the codes kept for the next look."""
        state: dict[str, Any] = {"history": self.history, **self.window.state_dict()}
        return state if self.group is None else {**state, "group": self.group, "cluster": self.cluster}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.history = list(state["history"])
        self.window.load_state_dict(state)
        self.group, self.cluster = state.get("group"), state.get("cluster")


def _agreement(before: torch.Tensor | None, now: torch.Tensor) -> float | None:
    """The adjusted Rand index of two groupings over the latents that are in a group of both; None if there are none."""
    if before is None:
        return None
    from sklearn.metrics import adjusted_rand_score

    both = (before >= 0) & (now >= 0)
    return float(adjusted_rand_score(before[both], now[both])) if bool(both.any()) else None


def _figure(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Threshold and number of groups over the steps as a plotly figure."""
    steps = [row["step"] for row in history]
    return {
        "data": [
            {"type": "scatter", "name": "threshold", "x": steps, "y": [row["threshold"] for row in history]},
            {"type": "scatter", "name": "groups", "x": steps, "y": [row["groups"] for row in history], "yaxis": "y2"},
        ],
        "layout": {
            "title": {"text": "Groups of latents"},
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": "threshold of the correlation"}},
            "yaxis2": {"title": {"text": "groups"}, "overlaying": "y", "side": "right"},
        },
    }
