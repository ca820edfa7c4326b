"""The callback `importance`: how much each latent matters, by its activation, by the gradient, and by what it tells of a label."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from saekit import Code, OptionError, Result, RunContext, SparseAutoencoder, SparseCode, Training, hookimpl

LEVELS = 3
"""Of a discretised activation: silent, up to the latent's own RMS where it fires, above it."""


def entries(code: Code) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, latents, values) of a code without a gradient, [nnz] each. For compressed codes no device is waited for, and values
    may be zero."""
    if isinstance(code, SparseCode):
        return code.pattern.rows, code.pattern.indices, code.values.detach()
    rows, latents, values = code.nonzero()
    return rows, latents, values.detach()


@torch.no_grad()
def gradient_importance(sae: SparseAutoencoder) -> Tensor:
    """|sum over the batch of a_j dL/da_j| of each latent, [d_sae], from the gradients that are there.

    A latent's activation is its pre-activation x W_j + b_j where it fires, so this is |W_j . dL/dW_j + b_j dL/db_j|. It is exact
    where the gate passes pre-activations on (ReLU, top-k, JumpReLU), and follows the encoder's gradient elsewhere."""
    if sae.W_enc.grad is None:
        return sae.W_enc.new_zeros(sae.d_sae)
    along = torch.bmm(sae.W_enc.t().unsqueeze(1), sae.W_enc.grad.t().unsqueeze(2)).view(-1)  # [d_sae]
    if sae.b_enc is not None and sae.b_enc.grad is not None:
        along = along + sae.b_enc * sae.b_enc.grad
    return along.abs()


def mutual_information(counts: Tensor) -> Tensor:
    """The mutual information in nats of two discrete values, from how often they occur together: [n, levels, classes] -> [n].

    sum over l, c of p(l, c) log(p(l, c) / (p(l) p(c))); 0 where nothing was counted."""
    p = counts.double() / counts.double().sum((1, 2), keepdim=True).clamp_min(1e-300)
    apart = p.sum(2, keepdim=True) * p.sum(1, keepdim=True)
    return torch.where(p > 0, p * (p / apart.clamp_min(1e-300)).clamp_min(1e-300).log(), 0.0).sum((1, 2)).clamp_min(0.0)


def levels_by_label(code: Code, label: Tensor, rms: Tensor) -> Tensor:
    """How often each latent is at each level with each label: [d_sae, LEVELS, 2]. label: [batch] of 0, 1 or NaN (not counted).

    rms: [d_sae], see `LEVELS`."""
    rows, latents, values = entries(code)
    known = ~label.isnan()
    positive = (label > 0.5).long()
    level = 1 + (values > rms[latents]).long()
    counted = (known[rows] & (values != 0)).to(torch.float32)
    flat = (latents * LEVELS + level) * 2 + positive[rows]
    counts = counted.new_zeros(code.d_sae * LEVELS * 2).index_add_(0, flat, counted).view(code.d_sae, LEVELS, 2)
    total = torch.stack([(known & (positive == c)).sum() for c in (0, 1)]).to(counts)  # [2]
    counts[:, 0] = total - counts.sum(1)
    return counts


class Importance:
    """A mixture of what latents do, what the loss asks of them, and what they tell: each a running mean over steps, from 0 to 1.

    activation: the mean activation times the decoder row's norm. gradient: |sum over the batch of activation times gradient of the
    whole loss|, as clipped. information: the mutual information between the latent's activation, in three levels, and a label of
    the source. Each is divided by its maximum over the latents, and `importance` is their mean by these weights.

    Others see it as `provided["importance"]`, and the threshold as `provided["importance_threshold"]`.
    """

    def __init__(
        self,
        *,
        activation: Annotated[float, Field(ge=0, description="The weight of activation importance.")] = 0.4,
        gradient: Annotated[float, Field(ge=0, description="The weight of gradient importance.")] = 0.6,
        information: Annotated[float, Field(ge=0, description="The weight of the mutual information with the label.")] = 0.0,
        label: Annotated[str, Field(description="The source's label that `information` is about.")] = "forget",
        memory: Annotated[float, Field(ge=0, lt=1, description="How much is kept from step to step.")] = 0.9,
        every: Annotated[int, Field(gt=0, description="Steps between two rankings.")] = 50,
        threshold: Annotated[float, Field(ge=0, le=1, description="Less than this is unimportant.")] = 0.01,
        percentile: Annotated[
            float | None, Field(ge=0, lt=100, description="A percentile of the living latents' importance as the threshold.")
        ] = None,
        listed: Annotated[int, Field(gt=0, description="How many latents the result lists.")] = 256,
    ) -> None:
        if activation + gradient + information == 0:
            raise OptionError("activation", "all weights are 0, so every latent would be as important. Give one of them.")
        self.weights = {"activation": activation, "gradient": gradient, "information": information}
        self.label, self.memory, self.every = label, memory, every
        self.threshold, self.percentile, self.listed = threshold, percentile, listed
        self._column: int | None = None
        self.running: dict[str, Tensor] = {}  # sums with memory: activation, gradient, squares, fired, counts
        self.importance: Tensor | None = None  # [d_sae]
        self.applied: Tensor | None = None  # the threshold, a scalar on the device
        self.history: list[dict[str, Any]] = []

    def prepare(self, context: RunContext) -> None:
        """Find the label. OptionError if the source does not have it."""
        if self.weights["information"]:
            concepts = list(getattr(context.source, "concepts", ()))
            if self.label not in concepts:
                there = f"It has: {', '.join(concepts)}." if concepts else "It has none: take a labelled source."
                raise OptionError("label", f"the source has no label {self.label!r}. {there}")
            self._column = concepts.index(self.label)

    @hookimpl
    def training_started(self, trainer: Training) -> None:
        """A resumed run goes on with what its checkpoint kept."""
        self.running = {name: tensor.to(trainer.device) for name, tensor in self.running.items()}
        if self.importance is not None and self.applied is not None:
            self._provide(trainer, self.importance.to(trainer.device), self.applied.to(trainer.device))

    @hookimpl
    @torch.no_grad()
    def gradients_ready(self, trainer: Training) -> None:
        """Take in the step's activations and gradients."""
        sae, code = trainer.sae, trainer.step.code
        _, latents, values = entries(code)
        zeros = sae.W_dec.new_zeros(sae.d_sae)
        sums = zeros.index_add(0, latents, values.to(zeros)) * sae.W_dec.norm(dim=1)
        self._add("activation", sums / max(len(code), 1))
        self._add("gradient", gradient_importance(sae))
        if self._column is not None and trainer.step.labels is not None:
            self._add("squares", zeros.index_add(0, latents, values.square().to(zeros)))
            self._add("fired", code.fired().to(zeros))
            rms = (self.running["squares"] / self.running["fired"].clamp_min(1e-12)).sqrt()
            self._add("counts", levels_by_label(code, trainer.step.labels[:, self._column], rms))

    def _add(self, name: str, value: Tensor) -> None:
        before = self.running.get(name)
        self.running[name] = value if before is None else self.memory * before + value

    @hookimpl
    def step_ended(self, trainer: Training, number: int) -> None:
        """Rank the latents when it is time."""
        if (number + 1) % self.every == 0:
            self.rank(trainer, number + 1)

    @torch.no_grad()
    def rank(self, trainer: Training, done: int) -> None:
        """Compute the importance now, after `done` steps."""
        parts = self.parts()
        total = sum(self.weights[name] for name in parts)
        importance = sum((self.weights[name] * part for name, part in parts.items()), start=torch.zeros_like(parts["gradient"]))
        importance = (importance / max(total, 1e-12)).masked_fill(trainer.firing.retired, 0.0)
        living = importance[~trainer.firing.retired]
        applied = importance.new_tensor(self.threshold)
        if self.percentile is not None and len(living):
            applied = torch.quantile(living, self.percentile / 100)
        self._provide(trainer, importance, applied)
        row = {"step": done, "threshold": float(applied), "above": int((living >= applied).sum()), "living": len(living)}
        self.history.append(row)

    def parts(self) -> dict[str, Tensor]:
        """What the importance is mixed of, each divided by its maximum: [d_sae] by name."""
        found = {name: self.running[name] for name in ("activation", "gradient")}
        if "counts" in self.running:
            found["information"] = mutual_information(self.running["counts"]).to(found["gradient"])
        return {name: part / part.max().clamp_min(1e-30) for name, part in found.items()}

    def _provide(self, trainer: Training, importance: Tensor, applied: Tensor) -> None:
        self.importance, self.applied = importance, applied
        trainer.provided["importance"], trainer.provided["importance_threshold"] = importance, applied

    def measures(self, trainer: Training) -> dict[str, float]:
        """The threshold, and how many latents reach it."""
        return {name: self.history[-1][name] for name in ("threshold", "above")} if self.history else {}

    def result(self) -> Result:
        """tables: latents (the most important first, with what their importance is mixed of), history."""
        if self.importance is None:
            return Result(notes=[f"Training ended before step {self.every}, when latents would have been ranked."])
        importance, parts = self.importance.cpu(), {name: part.cpu() for name, part in self.parts().items()}
        order = importance.argsort(descending=True, stable=True)
        rows = [
            {"latent": j, "importance": float(importance[j]), **{name: float(part[j]) for name, part in parts.items()}}
            for j in order[: self.listed].tolist()
        ]
        last = self.history[-1]
        notes = [] if last["above"] else ["No latent reaches the threshold."]
        return Result(
            scalars={name: last[name] for name in ("threshold", "above", "living")},
            tables={"latents": rows, "history": list(self.history)},
            figures={"importance": _figure(importance[order].tolist(), last["threshold"])},
            notes=notes,
            headline=["threshold", "above"],
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        state: dict[str, Any] = {"history": self.history, **{f"running.{name}": t for name, t in self.running.items()}}
        return state if self.importance is None else {**state, "importance": self.importance, "applied": self.applied}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.history = list(state["history"])
        self.running = {name.partition(".")[2]: t for name, t in state.items() if name.startswith("running.")}
        self.importance, self.applied = state.get("importance"), state.get("applied")


def _figure(ranked: list[float], threshold: float) -> dict[str, Any]:
    """The importance of the latents in their order, and the threshold, as a plotly figure."""
    ranks = list(range(1, len(ranked) + 1))
    ends = [1, max(len(ranked), 1)]
    return {
        "data": [
            {"type": "scatter", "name": "latents", "x": ranks, "y": ranked},
            {"type": "scatter", "name": "threshold", "x": ends, "y": [threshold] * 2, "line": {"dash": "dash"}},
        ],
        "layout": {
            "title": {"text": "Importance of the latents"},
            "xaxis": {"title": {"text": "rank"}, "type": "log"},
            "yaxis": {"title": {"text": "importance"}},
        },
    }
