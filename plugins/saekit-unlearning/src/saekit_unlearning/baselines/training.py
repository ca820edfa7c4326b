"""What methods that train the weights of a copy of the model share: which weights, the steps, and what is to stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saekit import Subject
from saekit_unlearning.baselines.material import Material, Rows
from saekit_unlearning.edited import copied, model_logits
from saekit_unlearning.kl import retain_kl
from saekit_unlearning.passages import Site

CHECKPOINTS = (60, 200)
"""After how many steps a method's model is tried, which makes a setting of each."""
WEIGHT = 10.0
"""Of what is to stay. The divergence to uniform is up to log(vocabulary), and what is tolerable here is a few hundredths."""


Loss = Callable[[Subject, Rows, list[Rows]], Tensor]
"""Of a subject whose weights are trained, on texts to forget and on each kind of text that is to stay."""


class Begin(Protocol):
    """From a site in a copy of the model to the parameters that are trained, and to what gives the model as it then is."""

    def __call__(self, site: Site) -> tuple[Sequence[nn.Parameter], Callable[[], Site]]: ...


def all_weights(site: Site) -> tuple[Sequence[nn.Parameter], Callable[[], Site]]:
    """All but embeddings; they alone are copied at each checkpoint."""
    parameters = trainable(site.subject.model)
    return parameters, lambda: copied(site, parameters)


def trained(
    material: Material,
    seed: int,
    loss: Loss,
    *,
    rate: float,
    checkpoints: Sequence[int],
    begin: Begin = all_weights,
) -> Iterator[tuple[int, Site]]:
    """A copy of the model goes down `loss`: (number of steps, the site in the model as it is then) at each checkpoint."""
    site, batches = copied(material.site), material.batches(seed)
    parameters, finish = begin(site)
    for step in steps(parameters, lambda: loss(site.subject, *next(batches)), rate=rate, checkpoints=checkpoints):
        yield step, finish()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """All weights but those of embeddings and of the unembedding, now with gradients."""
    left_out = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    unembedding = unembedding_of(model)
    if unembedding is not None:
        left_out |= {id(p) for p in unembedding.parameters()}
    found = [p for p in model.parameters() if id(p) not in left_out] or list(model.parameters())
    for p in found:
        p.requires_grad_(True)
    return found


def unembedding_of(model: Any) -> nn.Module | None:
    """The module that makes logits, if the model tells."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return found if isinstance(found, nn.Module) else None


def steps(
    parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], *, rate: float, checkpoints: Sequence[int]
) -> Iterator[int]:
    """Steps of Adam down `loss`; gives the number of steps done at each of `checkpoints`, and ends at the last.

    A parameter that the loss does not reach stays as it is. No gradient is left on anything."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for step in range(max(checkpoints, default=0) + 1):
        if step in checkpoints:
            yield step
        if step == max(checkpoints):
            return
        with torch.enable_grad():  # whoever asks for the settings may be in a block without
            gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad()


def stays(base: Subject, subject: Subject, texts: Sequence[Rows]) -> Tensor:
    """The sum over kinds of text of the mean over positions of KL(base || edited); 0 without any text."""
    total = torch.zeros((), device=subject.device)
    for rows in texts:
        with torch.no_grad():
            before = model_logits(base, rows.tokens, rows.mask)[rows.mask]  # [m, vocab]
        total = total + retain_kl(before, model_logits(subject, rows.tokens, rows.mask)[rows.mask]).mean()
    return total
