"""The analyzer `concept_recovery`: does one latent stand for each concept? Beside neurons, an untrained SAE and a probe."""

from __future__ import annotations

import copy
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from saekit import ComponentError, Result, auroc, auroc_interval, wilson_interval
from saekit_contrastive.labelled_rows import Entries, LabelledRows, best_latent, best_neuron, latents_of, ranks_of
from saekit_contrastive.probes import logistic

if TYPE_CHECKING:
    from saekit import RunContext, SparseAutoencoder

YARDSTICKS = {
    "neuron": "the best neuron",
    "untrained": "the best latent of an untrained SAE",
    "shuffled": "shuffled labels",
    "probe": "a linear probe",
}
_COLOURS = {"latent": "#c0392b", "neuron": "#2980b9", "untrained": "#7f8c8d", "shuffled": "#bdc3c7", "probe": "#27ae60"}


class ConceptRecovery:
    """For each concept of the source, the latent that tells it best on training activations, and its AUROC on held-out ones.

    Beside it stand, chosen and measured on the same rows: the best neuron and the best latent of an SAE that has the same
    architecture and first weights but no training, each of either sign; the best latent for labels that were shuffled, which is
    what the choice alone gives; and a logistic probe of all neurons, which no single unit need reach. A latent must fire *for* its
    concept. Intervals are clustered by sequence. A concept that does not occur as both 0 and 1 in both splits is left out.
    """

    def __init__(
        self,
        *,
        tokens: Annotated[int, Field(gt=0, description="How many activations of each split, at most.")] = 8000,
        recovered: Annotated[
            float, Field(gt=0.5, lt=1, description="The AUROC from which a concept counts as recovered.")
        ] = 0.9,
        shuffles: Annotated[int, Field(ge=1, description="How often the labels are shuffled.")] = 3,
    ) -> None:
        self.tokens, self.recovered, self.shuffles = tokens, recovered, shuffles

    @torch.no_grad()
    def __call__(self, context: RunContext) -> Result:
        """scalars: recovered and its share, the same of each yardstick. table: concepts. figure: concepts."""
        train = LabelledRows.of(context.training_activations(self.tokens))
        held_out = LabelledRows.of(context.held_out_activations(self.tokens))
        concepts = list(context.source.concepts)
        there = [column for column in range(len(concepts)) if train.occurs(column) and held_out.occurs(column)]
        if not there:
            raise ComponentError("no concept occurs as both 0 and 1 in each split, so none can be told. Raise tokens.")
        trained = [latents_of(context.sae, rows.x * context.scale) for rows in (train, held_out)]
        untrained = [latents_of(_untrained(context, train.x), rows.x * context.scale) for rows in (train, held_out)]
        draws, ranks = torch.Generator().manual_seed(context.seed), ranks_of(train.x)
        rows = []
        for column in there:
            known, known_too = (~part.labels[:, column].isnan() for part in (train, held_out))
            y, z = train.labels[:, column], held_out.labels[:, column]
            chosen, score = _by_latent(trained, y, z, against=False)
            interval = auroc_interval(*(_plain(values) for values in (score, z, held_out.sequence)))
            neuron = best_neuron(ranks if known.all() else ranks_of(train.x[known]), y[known])
            probe = logistic(train.x[known], y[known])
            rows.append(
                {
                    "concept": concepts[column],
                    "with_it": int((z[known_too] > 0.5).sum()),
                    "latent": chosen.unit,
                    "auroc": auroc(score, z),
                    "low": interval.low if interval else None,
                    "high": interval.high if interval else None,
                    "on_training_data": chosen.auroc,
                    "firing": float((score[z > 0.5] > 0).double().mean()),
                    "firing_elsewhere": float((score[z <= 0.5] > 0).double().mean()),
                    "neuron": auroc(neuron.sign * held_out.x[:, neuron.unit], z),
                    "untrained": auroc(_by_latent(untrained, y, z, against=True)[1], z),
                    "shuffled": fmean(self._shuffled(trained, y, z, draws)),
                    "probe": auroc(held_out.x @ probe.to(held_out.x), z),
                }
            )
        return self._result(rows, [name for column, name in enumerate(concepts) if column not in there])

    def _shuffled(self, entries: list[Entries], y: Tensor, z: Tensor, draws: torch.Generator) -> list[float]:
        """The AUROC of the latent that is best for shuffled labels, on rows whose labels are shuffled too."""
        found = []
        for _ in range(self.shuffles):
            y, z = (labels[torch.randperm(len(labels), generator=draws).to(labels.device)] for labels in (y, z))
            found.append(auroc(_by_latent(entries, y, z, against=False)[1], z) or 0.5)
        return found

    def _result(self, rows: list[dict[str, Any]], left_out: list[str]) -> Result:
        n = len(rows)
        reached = {name: sum((row[name] or 0) >= self.recovered for row in rows) for name in ("auroc", *YARDSTICKS)}
        low, high = wilson_interval(reached["auroc"], n)
        scalars: dict[str, float | int | None] = {
            "recovered_share": reached["auroc"] / n, "recovered_share_low": low, "recovered_share_high": high,
            "recovered_share_n": n, "median_auroc": median(row["auroc"] for row in rows),
        }  # fmt: skip
        for name in YARDSTICKS:
            scalars[f"{name}_share"] = reached[name] / n
            scalars[f"{name}_median_auroc"] = median(row[name] for row in rows)
        return Result(
            scalars=scalars,
            tables={"concepts": rows},
            figures={"concepts": _figure(rows, self.recovered)},
            notes=self._sentences(rows, reached, left_out),
            headline=["recovered_share", "neuron_share", "untrained_share", "probe_share"],
        )

    def _sentences(self, rows: list[dict[str, Any]], reached: dict[str, int], left_out: list[str]) -> list[str]:
        n = len(rows)
        better = {name: sum(row["auroc"] > row[name] for row in rows) for name in ("neuron", "untrained")}
        beyond = reached["auroc"] > max(reached["neuron"], reached["untrained"])
        notes = [
            f"A single latent, chosen on training data, tells {reached['auroc']} of {n} concepts with an AUROC of at least "
            f"{self.recovered:g} on held-out data; "
            + ", ".join(f"{words} {reached[name]}" for name, words in YARDSTICKS.items())
            + ". "
            + _verdict(beyond, 2 * better["neuron"] > n),
            f"The latent is better than the best neuron for {better['neuron']} of {n} concepts, and than the best latent of the "
            f"untrained SAE for {better['untrained']}.",
        ]
        missed = [f"{row['concept']} ({row['auroc']:.2f})" for row in rows if row["auroc"] < self.recovered]
        if missed:
            notes.append(f"Not recovered: {', '.join(missed)}.")
        shared: dict[int, list[str]] = {}
        for row in rows:
            shared.setdefault(row["latent"], []).append(row["concept"])
        twice = [f"{latent} ({', '.join(names)})" for latent, names in shared.items() if len(names) > 1]
        if twice:
            notes.append(f"Latents that are the best for several concepts: {'; '.join(twice)}.")
        if left_out:
            notes.append(f"Left out, as they do not occur as both 0 and 1 in each split: {', '.join(left_out)}.")
        return notes


def _verdict(more: bool, mostly_better: bool) -> str:
    """more: than neurons and the untrained SAE. mostly_better: than the neuron, for more than half of the concepts."""
    if not more:
        return "That is no more than its controls give, so this run does not show that the SAE found the concepts."
    if mostly_better:
        return "That is more than its controls give, and the latent is mostly better than the neuron."
    return "That is more than its controls give, but for most concepts the best neuron is as good or better."


def _by_latent(entries: list[Entries], y: Tensor, z: Tensor, *, against: bool) -> tuple[Any, Tensor]:
    """The best latent for training labels y, and its activations, with its sign, at the held-out rows, whose labels are z."""
    chosen = best_latent(entries[0], y, against=against)
    return chosen, chosen.sign * entries[1].column(chosen.unit, len(z))


def _untrained(context: RunContext, x: Tensor) -> SparseAutoencoder:
    """An SAE of the same architecture as at its first step: its encoder has the size that training would begin with."""
    sae = copy.deepcopy(context.sae)
    sae.initialise(torch.Generator().manual_seed(context.seed), x * context.scale)
    return sae


def _plain(values: Tensor) -> Any:
    return values.detach().double().cpu().numpy()


def _figure(rows: list[dict[str, Any]], recovered: float) -> dict[str, Any]:
    names = [row["concept"] for row in rows]
    data: list[dict[str, Any]] = []
    for key, words in {"auroc": "the best latent", **YARDSTICKS}.items():
        mark: dict[str, Any] = {
            "type": "scatter", "mode": "markers", "name": words, "y": names, "x": [row[key] for row in rows],
            "marker": {"color": _COLOURS["latent" if key == "auroc" else key], "size": 10 if key == "auroc" else 7},
        }  # fmt: skip
        if key == "auroc":
            known = [row["low"] is not None for row in rows]
            up = [row["high"] - row["auroc"] if there else 0 for row, there in zip(rows, known, strict=True)]
            down = [row["auroc"] - row["low"] if there else 0 for row, there in zip(rows, known, strict=True)]
            mark["error_x"] = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
        data.append(mark)
    layout = {
        "xaxis": {"title": {"text": "AUROC on held-out data"}},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "height": 160 + 22 * len(names),
        "shapes": [{"type": "line", "x0": recovered, "x1": recovered, "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dot"}}],
    }
    return {"data": data, "layout": layout}
