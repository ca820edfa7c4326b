"""Which latents fire, and how long the others have been silent."""

from __future__ import annotations

import torch
from torch import Tensor


class FiringStatistics:
    """For each latent, how many activations have passed since it last fired.

    silent: [d_sae], that number.
    dead: [d_sae], whether it is `dead_after` or more.
    n_dead: how many are dead. The last two are updated only every `check_every` steps, since the host has to wait for them.
    retired: [d_sae], whether it was taken out of the dictionary for good. A retired latent is never dead: nothing revives it.
    n_retired, retired_latents: how many are retired, and which: [n_retired].
    """

    def __init__(self, d_sae: int, dead_after: int, device: torch.device, check_every: int = 10) -> None:
        self.dead_after, self.check_every = dead_after, check_every
        self.silent = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.dead = torch.zeros(d_sae, dtype=torch.bool, device=device)
        self.n_dead = 0
        self.retired = torch.zeros(d_sae, dtype=torch.bool, device=device)
        self.n_retired = 0
        self.retired_latents = torch.empty(0, dtype=torch.long, device=device)

    def update(self, fired: Tensor, rows: int, number: int) -> None:
        """Take in step `number`: `fired` [d_sae] counts of rows in which each latent fired, of `rows` rows."""
        self.silent += rows
        self.silent.masked_fill_(fired > 0, 0)
        if (number + 1) % self.check_every == 0:
            self.dead = (self.silent >= self.dead_after) & ~self.retired
            self.n_dead = int(self.dead.sum())

    def retire(self, latents: Tensor) -> None:
        """Count these latents as retired; `Training.retire` also silences them."""
        self.retired[latents] = True
        self.dead &= ~self.retired
        self._count()

    def _count(self) -> None:
        self.retired_latents = self.retired.nonzero().squeeze(1)
        self.n_dead, self.n_retired = int(self.dead.sum()), len(self.retired_latents)

    def revive(self, latents: Tensor) -> None:
        """Count these latents as living again, after they got new weights."""
        self.silent[latents] = 0
        self.dead[latents] = False
        self.n_dead = int(self.dead.sum())

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"silent": self.silent, "dead": self.dead, "retired": self.retired}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.silent.copy_(state["silent"])
        self.dead = state["dead"].to(self.silent.device)
        self.retired.copy_(state.get("retired", torch.zeros_like(self.retired)))  # absent from checkpoints of earlier versions
        self._count()
