"""What methods that train the weights of a copy of the model share: which weights, the steps, and what is to stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saekit import Subject
from saekit_unlearning.baselines.material import Rows
from saekit_unlearning.edited import model_logits
from saekit_unlearning.kl import retain_kl

CHECKPOINTS = (25, 60)
"""After how many steps a method's model is tried, which makes a setting of each."""
WEIGHT = 10.0
"""Of what is to stay. The divergence to uniform is up to log(vocabulary), and what is tolerable here is a few hundredths."""


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
