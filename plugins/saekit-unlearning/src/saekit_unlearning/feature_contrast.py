"""The loss `feature_contrast`: latents of a group respond to the same inputs, those of different groups do not."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from saekit import Step


class FeatureContrast:
    """mean of 1 - r_ij within groups + separation * mean of r_ij^2 between groups + diversity * mean of max(0, c_ij)^2 within.

    r_ij is the Pearson correlation of two latents' activations over the batch, c_ij the cosine of their decoder rows: latents of
    a group should respond together and still write different things. The means are over pairs of different latents that vary
    in the batch. At most `groups` groups and `members` of each, drawn at each step, take part, so that neither [batch, d_sae] nor
    all pairs are ever built. It is inactive while there is no group.
    """

    def __init__(
        self,
        *,
        separation: Annotated[float, Field(ge=0, description="The weight of what separates groups.")] = 1.0,
        diversity: Annotated[
            float, Field(ge=0, description="The weight of what keeps the decoder rows of a group apart.")
        ] = 0.1,
        groups: Annotated[int, Field(gt=0, description="The most groups that take part in a step.")] = 32,
        members: Annotated[int, Field(gt=1, description="The most latents of each group that take part in a step.")] = 8,
    ) -> None:
        self.separation, self.diversity, self.groups, self.members = separation, diversity, groups, members
        self._of: Tensor | None = None  # the groups that `_members` was made from
        self._members: list[Tensor] = []  # the latents of each group, on the host

    def active(self, step: Step) -> bool:
        """Whether there is a group."""
        return bool(self._latents_of(step.provided.get("groups")))

    def _latents_of(self, groups: Tensor | None) -> list[Tensor]:
        """The latents of each group. A device is waited for only when the groups are new."""
        if groups is not self._of:
            self._of, self._members = groups, []
            if groups is not None:
                host = groups.cpu()
                self._members = [(host == g).nonzero().squeeze(1) for g in range(int(host.max()) + 1)]
        return self._members

    def __call__(self, step: Step) -> Tensor:
        """A scalar."""
        latents, owner = self._drawn(step)  # [n] each
        values = step.code.columns(latents)  # [batch, n]
        centred = values - values.mean(0)
        spread = centred.square().sum(0)  # [n]
        varies = spread.detach() > 1e-6 * values.detach().square().sum(0)
        unit = centred * torch.where(varies, spread, 1.0).rsqrt() * varies  # [batch, n]
        r = unit.t() @ unit  # [n, n]
        pairs = varies[:, None] & varies[None, :] & ~torch.eye(len(latents), dtype=torch.bool, device=r.device)
        same = owner[:, None] == owner[None, :]
        loss = _mean(1 - r, pairs & same)
        if self.separation:
            loss = loss + self.separation * _mean(r.square(), pairs & ~same)
        if self.diversity:
            rows = normalize(step.sae.W_dec[latents], dim=1)  # [n, d_out]
            loss = loss + self.diversity * _mean((rows @ rows.t()).relu().square(), pairs & same)
        return loss

    def _drawn(self, step: Step) -> tuple[Tensor, Tensor]:
        """Some latents of some groups, and the number of the group of each: [n] each. Drawn from torch's own generator."""
        found = self._latents_of(step.provided["groups"])
        if len(found) > self.groups:
            found = [found[i] for i in torch.randperm(len(found))[: self.groups].tolist()]
        some = [m if len(m) <= self.members else m[torch.randperm(len(m))[: self.members]] for m in found]
        owner = torch.arange(len(some)).repeat_interleave(torch.tensor([len(m) for m in some]))
        device = step.code.sum().device
        return torch.cat(some).to(device, non_blocking=True), owner.to(device, non_blocking=True)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """The mean of the chosen entries; 0 if there are none."""
    return (values * where).sum() / where.sum().clamp_min(1)
