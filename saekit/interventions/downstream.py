"""A guard: what is read must be downstream of the edit, or it cannot show the edit's effect.

If the output of block L's MLP is edited and the residual stream is read before block L, the effect is zero for any
edit, and the zero looks like a finding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saekit.activations.sites import Site, resolve
from saekit.errors import UsageError
from saekit.numerics import seeded

if TYPE_CHECKING:
    from saekit.interventions.attach import Attachment

_LATER = "Read at a later hook point, or edit at an earlier one."


def site_of(model: nn.Module, at: str | Site) -> Site:
    """`at` as a site of `model`."""
    return at if isinstance(at, Site) else resolve(model, at)


def ensure_downstream(model: nn.Module, edited_at: str | Site, read_at: str | Site, inputs: Any) -> None:
    """Raise a UsageError that names both hook points if a read at one cannot show an edit at the other.

    Two forwards on `inputs` (a tensor, a tuple of arguments, or a mapping of them by name; no cache) decide it: the
    read must come after the edit, and its value must change when the edited value is disturbed, which excludes
    parallel branches. Reading at the edited hook point itself is downstream of the edit.
    """
    edited, read = site_of(model, edited_at), site_of(model, read_at)
    with seeded(0, _device(model)):
        reached, plain = _values(model, edited, read, inputs, disturb=False)
    for name, site in (("edit", edited), ("read", read)):
        if name not in reached:
            raise site.not_reached()
    if reached[0] == "read":
        raise not_downstream(edited.name, read.name)
    with seeded(0, _device(model)):  # the same dropout, if there is any
        _, disturbed = _values(model, edited, read, inputs, disturb=True)
    if all(map(torch.equal, plain, disturbed)):
        raise UsageError(
            f"reading at {read.name!r} shows nothing of an edit at {edited.name!r}: it comes later but does not "
            f"depend on it (it may be on a parallel branch). {_LATER}"
        )


def not_downstream(edited_at: str, read_at: str) -> UsageError:
    """The error for a read that comes before the edit."""
    return UsageError(
        f"reading at {read_at!r} is not downstream of the edit at {edited_at!r}: the model reaches it first, so the "
        f"read never sees the edit. {_LATER}"
    )


class ReadAfter:
    """Checks at every read that the edit was applied since the read before it."""

    def __init__(self, edit: Attachment, read_at: str) -> None:
        self._edit, self._read_at, self._seen = edit, read_at, edit.visits

    def check(self) -> None:
        """UsageError if the edit was not applied first."""
        if self._edit.visits == self._seen:
            raise not_downstream(self._edit.site.name, self._read_at)
        self._seen = self._edit.visits

    def passed(self, activation: Tensor) -> Tensor:
        """`check`, as a function for `Site.replaced` that replaces nothing."""
        self.check()
        return activation


@torch.no_grad()
def _values(
    model: nn.Module, edited: Site, read: Site, inputs: Any, *, disturb: bool
) -> tuple[list[str], list[Tensor]]:
    """The order in which one forward reaches "edit" and "read", and the values at each "read"."""
    reached: list[str] = []
    values: list[Tensor] = []

    def at_edit(activation: Tensor) -> Tensor:
        reached.append("edit")
        if not disturb:
            return activation
        noise = torch.randn(activation.shape, generator=torch.Generator().manual_seed(0)).to(activation)
        return activation + noise * activation.std().clamp_min(1e-3)

    def at_read(activation: Tensor) -> Tensor:
        reached.append("read")
        values.append(activation.clone())
        return activation

    with edited.replaced(at_edit), read.replaced(at_read):
        if isinstance(inputs, Mapping):
            model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            model(*inputs)
        else:
            model(inputs)
    return reached, values


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
