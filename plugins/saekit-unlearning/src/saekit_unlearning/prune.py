"""The callback `prune`: takes the least important latents out of the dictionary, or gives them new weights."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from saekit_revival.renewal import renew
from torch import Tensor

from saekit import Result, Training, hookimpl


class Prune:
    """Every `every` steps, retires a share of the living latents: the least important of those below the threshold.

    Importance and threshold are those of the callback `importance`. A retired latent is silent for the rest of the run, no loss
    moves it, and neither `auxk` nor `resample` brings it back. With `reinitialise` these latents get new weights instead, from
    inputs that are rebuilt badly, as by `resample`. With `curriculum` the share grows in a line over the run, from 0 to `share`.
    Fixed latents are left alone.
    """

    def __init__(
        self,
        *,
        every: Annotated[int, Field(gt=0, description="Steps between two prunings.")] = 50,
        share: Annotated[float, Field(gt=0, lt=1, description="The most of the living latents that are pruned at once.")] = 0.1,
        curriculum: Annotated[bool, Field(description="Let the share grow over the run.")] = False,
        reinitialise: Annotated[bool, Field(description="Give them new weights in place of retiring them.")] = False,
        keep: Annotated[float, Field(ge=0, le=1, description="The share of all latents that is never retired.")] = 0.5,
        start: Annotated[int, Field(ge=0, description="No pruning before so many steps.")] = 100,
        until: Annotated[float, Field(gt=0, le=1, description="No pruning after this share of the run.")] = 0.8,
    ) -> None:
        self.every, self.share, self.curriculum, self.reinitialise = every, share, curriculum, reinitialise
        self.keep, self.start, self.until = keep, start, until
        self.history: list[dict[str, Any]] = []
        self.retired_at: Tensor | None = None  # [d_sae], after how many steps; -1 for the living

    @hookimpl
    def step_ended(self, trainer: Training, number: int) -> None:
        """Prune when it is time, and there is a ranking."""
        done = number + 1
        due = done % self.every == 0 and self.start <= done <= self.until * trainer.total_steps
        if due and "importance" in trainer.provided:
            self.prune(trainer, done)

    def share_at(self, done: int, total: int) -> float:
        """The share after `done` of `total` steps."""
        return self.share * (min(done / total, 1.0) if self.curriculum else 1.0)

    @torch.no_grad()
    def prune(self, trainer: Training, done: int) -> Tensor:
        """Prune now, after `done` steps. Returns the latents [n]."""
        sae, retired = trainer.sae, trainer.firing.retired
        if self.retired_at is None:
            self.retired_at = torch.full((sae.d_sae,), -1, dtype=torch.long)
        importance, threshold = trainer.provided["importance"], trainer.provided["importance_threshold"]
        candidates = (importance < threshold) & ~retired
        candidates[sae.fixed_latents] = False
        living = sae.d_sae - trainer.firing.n_retired
        share = self.share_at(done, trainer.total_steps)
        room = living if self.reinitialise else living - round(self.keep * sae.d_sae)
        n = max(min(int(share * living), int(candidates.sum()), room), 0)
        order = importance.masked_fill(~candidates, torch.inf).sort(stable=True).indices
        chosen = order[:n]
        if self.reinitialise:
            chosen = renew(trainer, chosen)
        elif n:
            trainer.retire(chosen)
            self.retired_at[chosen.cpu()] = done
        row = {"step": done, "share": share, "candidates": int(candidates.sum()), "pruned": len(chosen)}
        self.history.append({**row, "living": sae.d_sae - trainer.firing.n_retired, "threshold": float(threshold)})
        return chosen

    def measures(self, trainer: Training) -> dict[str, float]:
        """How many latents live, and how many have been pruned."""
        return {"living": trainer.sae.d_sae - trainer.firing.n_retired, "pruned": self._pruned()}

    def _pruned(self) -> int:
        return sum(row["pruned"] for row in self.history)

    def result(self) -> Result:
        """tables: retired (latent, step), history (a row for each pruning)."""
        if self.retired_at is None:
            return Result(scalars={"pruned": 0}, notes=["There was no pruning: training was too short, or nothing was ranked."])
        gone = (self.retired_at >= 0).nonzero().squeeze(1)
        gone = gone[self.retired_at[gone].argsort(stable=True)]
        rows = [{"latent": j, "step": at} for j, at in zip(gone.tolist(), self.retired_at[gone].tolist(), strict=True)]
        idle = sum(not row["pruned"] for row in self.history)
        notes = [f"{idle} of {len(self.history)} prunings found no latent below the threshold that could go."] if idle else []
        return Result(
            scalars={"pruned": self._pruned(), "retired": len(rows), "living": len(self.retired_at) - len(rows)},
            tables={"history": list(self.history), "retired": rows},
            notes=notes,
            headline=["retired"],
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; which latents are retired is in the training's own state."""
        state: dict[str, Any] = {"history": self.history}
        return state if self.retired_at is None else {**state, "retired_at": self.retired_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.history, self.retired_at = list(state["history"]), state.get("retired_at")
