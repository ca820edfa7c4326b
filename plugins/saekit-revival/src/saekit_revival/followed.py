"""What became of latents that were given a new start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saekit import Result, Training, wilson_interval
from saekit_revival.renewal import renew

KINDS = ("revived", "redrawn", "left")
"""Dead latents that came back; living ones that got new weights beside them; living ones that were left alone."""


class Followed:
    """Asks of every revival, `after` steps later, how many of its latents are alive, beside two controls of the same size.

    The controls are living latents drawn at random: `redrawn` ones get new weights as resampling gives them (at most `control` at
    once, 0 for none: it costs what they had learned), and the ones `left` alone get nothing.
    """

    def __init__(self, after: int, control: int) -> None:
        self.after, self.control = after, control
        self.events: list[dict[str, Any]] = []
        """One for each step with revivals: `step`, how many of each kind, and `KIND_alive`, None until it is known."""
        self.since: Tensor | None = None  # [3, d_sae], the steps done when following began, by kind; -1: not followed

    @torch.no_grad()
    def begin(self, trainer: Training, revived: Tensor, alive: Tensor, done: int) -> Tensor:
        """Follow the latents [n] that were revived after `done` steps. Returns the living ones that were redrawn: [m].

        alive: [d_sae], which latents are."""
        redrawn = revived[:0]
        if len(revived) == 0:
            return redrawn
        living = alive & ~trainer.firing.retired
        living[revived] = False
        left = _drawn(trainer, living, len(revived))
        living[trainer.sae.fixed_latents] = False
        if self.control:
            redrawn = renew(trainer, _drawn(trainer, living, min(self.control, len(revived))))
        if self.since is None:
            self.since = torch.full((len(KINDS), trainer.sae.d_sae), -1, dtype=torch.long)
        self.since = self.since.to(revived.device)
        event: dict[str, Any] = {"step": done}
        for kind, name, latents in zip(range(len(KINDS)), KINDS, (revived, redrawn, left), strict=True):
            self.since[kind, latents] = done  # whoever was revived before, and is so again, has not lived
            event |= {name: len(latents), f"{name}_alive": None}
        self.events.append(event)
        return redrawn

    def due(self, done: int) -> bool:
        """Whether the time of an event has come after `done` steps."""
        return any(event["step"] + self.after <= done for event in self._open())

    @torch.no_grad()
    def look(self, alive: Tensor, done: int) -> None:
        """Note of each event that is due how many of its latents are alive: [d_sae]."""
        assert self.since is not None  # there are events
        self.since = self.since.to(alive.device)
        for event in self._open():
            if event["step"] + self.after <= done:
                counts = ((self.since == event["step"]) & alive).sum(1).tolist()
                event.update({f"{name}_alive": count for name, count in zip(KINDS, counts, strict=True)})

    def _open(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["revived_alive"] is None]

    def result(self) -> Result:
        """scalars: revived (latents, counted at each revival), KIND_alive_share with its interval, of those long enough ago.
        tables: events."""
        scalars: dict[str, float | int | None] = {"revived": sum(event["revived"] for event in self.events)}
        told = [event for event in self.events if event["revived_alive"] is not None]
        for name in KINDS:
            n, alive = sum(event[name] for event in told), sum(event[f"{name}_alive"] for event in told)
            share = f"{name}_alive_share"
            scalars[share] = alive / n if n else None
            if n:
                low, high = wilson_interval(alive, n)
                scalars |= {f"{share}_low": low, f"{share}_high": high, f"{share}_n": n}
        return Result(
            scalars=scalars,
            tables={"events": [dict(event) for event in self.events]} if self.events else {},
            notes=[self._sentence(scalars)],
            headline=["revived", "revived_alive_share"],
        )

    def _sentence(self, scalars: dict[str, Any]) -> str:
        if not self.events:
            return "No latent was revived."
        if "revived_alive_share_n" not in scalars:
            return f"Every revival was less than {self.after:,} steps before the end, so none can be judged."
        said = f"{self.after:,} steps later {scalars['revived_alive_share']:.0%} of the revived latents were alive"
        controls = [
            f"{scalars[f'{name}_alive_share']:.0%} of {what}"
            for name, what in (("redrawn", "the living ones that got new weights"), ("left", "living ones left alone"))
            if f"{name}_alive_share_n" in scalars
        ]
        said += f", {' and '.join(controls)}." if controls else "."
        if not self.control:
            said += " Living latents with new weights, the control for a revival by new weights, need the option `control`."
        return said

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        state: dict[str, Any] = {"events": self.events}
        return state if self.since is None else {**state, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.events, self.since = [dict(event) for event in state["events"]], state.get("since")


def _drawn(trainer: Training, among: Tensor, n: int) -> Tensor:
    """At most n of the latents that are True in `among` [d_sae], at random."""
    candidates = among.nonzero().squeeze(1)
    order = torch.randperm(len(candidates), generator=trainer.generator)[:n]
    return candidates[order.to(candidates.device)]
