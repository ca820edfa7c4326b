"""The callback `stability`: how much of the ranking and of the dictionary survives between checks."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity

from saekit import Result, Training, hookimpl

MEASURES = ("rank_correlation", "top_overlap", "decoder_cosine")


class Stability:
    """Every `every` steps, compares the latents' importance and decoder rows with those of the check before.

    rank_correlation: Spearman's, over the latents that live at both checks. top_overlap: the Jaccard index of the `top` most
    important latents. decoder_cosine: the mean cosine of each living latent's decoder row with what it was. The importance is
    that of the callback `importance`; name that one first.
    """

    def __init__(
        self,
        *,
        every: Annotated[int, Field(gt=0, description="Steps between two checks.")] = 100,
        top: Annotated[int, Field(gt=0, description="How many of the most important latents are compared.")] = 50,
    ) -> None:
        self.every, self.top = every, top
        self.importance: Tensor | None = None  # [d_sae], at the check before
        self.rows: Tensor | None = None  # [d_sae, d_out]
        self.history: list[dict[str, Any]] = []

    @hookimpl
    def training_started(self, trainer: Training) -> None:
        """Move to the device what a checkpoint has restored."""
        if self.importance is not None and self.rows is not None:
            self.importance, self.rows = self.importance.to(trainer.device), self.rows.to(trainer.device)

    @hookimpl
    def step_ended(self, trainer: Training, number: int) -> None:
        """Check when it is time, and there is a ranking."""
        if (number + 1) % self.every == 0 and "importance" in trainer.provided:
            self.check(trainer, number + 1)

    @torch.no_grad()
    def check(self, trainer: Training, done: int) -> None:
        """Compare with the check before, and keep what is now."""
        importance, rows = trainer.provided["importance"], trainer.sae.W_dec.detach().clone()
        living = ~trainer.firing.retired
        if self.importance is not None and self.rows is not None:
            pair = self.importance[living], importance[living]
            cosine = cosine_similarity(self.rows[living], rows[living], dim=1)
            values = (spearman(*pair), overlap(*pair, self.top), float(cosine.mean()) if len(cosine) else None)
            self.history.append({"step": done, **dict(zip(MEASURES, values, strict=True))})
        self.importance, self.rows = importance, rows

    def measures(self, trainer: Training) -> dict[str, float]:
        """The values of the last check."""
        last = self.history[-1] if self.history else {}
        return {name: last[name] for name in MEASURES if last.get(name) is not None}

    def result(self) -> Result:
        """scalars: the values of the last check. tables: history."""
        if not self.history:
            return Result(notes=[f"There were not two checks: training ended before step {2 * self.every}, or nothing was ranked."])
        steps = [row["step"] for row in self.history]
        lines = [{"type": "scatter", "name": n, "x": steps, "y": [row[n] for row in self.history]} for n in MEASURES]
        layout = {"title": {"text": "What survives between checks"}, "xaxis": {"title": {"text": "step"}}}
        return Result(
            scalars={name: self.history[-1][name] for name in MEASURES},
            tables={"history": list(self.history)},
            figures={"history": {"data": lines, "layout": layout}},
            headline=list(MEASURES),
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the check before, with a copy of the decoder."""
        state: dict[str, Any] = {"history": self.history}
        return state if self.importance is None else {**state, "importance": self.importance, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.history = list(state["history"])
        self.importance, self.rows = state.get("importance"), state.get("rows")


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation of two vectors; None if one of them does not vary."""
    from scipy.stats import spearmanr

    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    return float(spearmanr(a.cpu(), b.cpu()).statistic)


def overlap(a: Tensor, b: Tensor, top: int) -> float | None:
    """The Jaccard index of the `top` largest entries of two vectors; None if there are none."""
    n = min(top, len(a))
    first, second = (set(v.sort(descending=True, stable=True).indices[:n].tolist()) for v in (a, b))
    return len(first & second) / len(first | second) if n else None
