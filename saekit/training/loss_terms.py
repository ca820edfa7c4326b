"""The weighted terms of a run's total loss, and the guard that checks that each of them teaches something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saekit.errors import PluginError, RunError, SaekitError, under_key
from saekit.registered import RegisteredComponent
from saekit.schedules import value_at
from saekit.training.loss_input import Step


@dataclass
class Term:
    """One loss of the run: its name there, the callable, its weight (a number or a schedule), the component."""

    label: str
    function: Callable[[Step], Tensor]
    weight: Any
    component: RegisteredComponent
    has_taught: bool = field(default=False, init=False)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The loss's own trainable parameters, named `loss.LABEL.NAME`."""
        if not isinstance(self.function, nn.Module):
            return []
        return [(f"loss.{self.label}.{name}", p) for name, p in self.function.named_parameters()]

    def weight_at(self, number: int, total: int) -> float:
        """The weight at step `number` of `total`."""
        return value_at(self.weight, number, total)

    def value(self, step: Step) -> Tensor | None:
        """The unweighted loss, or None if it has nothing to say about this step."""
        active = getattr(self.function, "active", None)
        try:
            with under_key(f"loss.{self.label}"):
                if active is not None and not active(step):
                    return None
                value = self.function(step)
        except SaekitError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self.component.origin} failed at step {step.number}: {type(error).__name__}: {error}. "
                f"Fix it, or leave {self.label!r} out of the run; what was saved is kept."
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PluginError(f"{self.component.origin} returned {got}; a loss returns a scalar tensor.")
        return value.reshape(())


def refuse_non_finite(values: dict[str, Tensor], number: int) -> None:
    """RunError that names the loss and the step if any of the (detached) values is not finite.

    "loss" is the weighted sum, which comes last."""
    for label, value in values.items():
        if not bool(torch.isfinite(value)):
            if label == "loss":
                raise RunError(f"the weighted sum of the losses is {float(value)} at step {number}. Start with smaller weights.")
            raise RunError(
                f"loss {label!r} is {float(value)} at step {number}. The last checkpoint is from before and is kept, but a "
                f"resumed run would come to the same. Start one with a lower training.lr or a smaller weight of {label!r}."
            )


def refuse_non_finite_gradient(norm: Tensor, values: dict[str, Tensor], number: int) -> None:
    """RunError that names the step and the losses if the norm of the whole gradient is not finite."""
    if not bool(torch.isfinite(norm)):
        losses = ", ".join(f"{label} = {float(value):.6g}" for label, value in values.items() if label != "loss")
        raise RunError(
            f"the gradient is not finite at step {number}, though the losses are ({losses}): one of them has an infinite "
            "slope there, such as a square root or a norm has at zero, or far too large a weight. The last checkpoint is "
            "from before and is kept."
        )


def failed_backward(terms: list[Term], error: Exception) -> PluginError:
    """The error to raise if a backward pass through some losses raised `error`."""
    who = " and ".join(term.component.origin for term in terms)
    return PluginError(f"the backward pass of {who} failed: {type(error).__name__}: {error}.")


class GradientGuard:
    """Watches in the first steps which parameters receive a gradient, and which losses give one.

    It costs an extra backward for each loss until that loss has taught something, usually one step.
    """

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], terms: list[Term]) -> None:
        self._waiting = dict(parameters)
        self._terms = terms

    def watch_losses(self, values: dict[str, Tensor], parameters: list[nn.Parameter]) -> None:
        """Before backward: whether each loss, on its own, reaches any parameter."""
        for term in self._terms:
            value = values.get(term.label)
            if term.has_taught or value is None or not value.requires_grad:
                continue
            try:
                gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise failed_backward([term], error) from error
            term.has_taught = any(g is not None and bool(g.any()) for g in gradients)

    def watch_parameters(self) -> None:
        """After backward: which parameters have received a gradient that is not zero everywhere."""
        self._waiting = {n: p for n, p in self._waiting.items() if p.grad is None or not bool(p.grad.any())}

    def findings(self, spoke: set[str]) -> list[str]:
        """What to tell the user after the first steps; `spoke` are the losses that were ever active."""
        found = [f"No gradient has reached parameter {name!r} in the first steps." for name in self._waiting]
        for term in self._terms:
            if term.label in spoke and not term.has_taught:
                found.append(
                    f"Loss {term.label!r} has given no gradient to any parameter in the first steps: it changes nothing."
                )
        return found
