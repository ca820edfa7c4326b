"""The checks of a loss. Each builds it again and gives it steps of a small SAE."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saekit.errors import PluginError
from saekit.run_file import parse_config
from saekit.runner.context import RunContext
from saekit.runner.plan import plan_run
from saekit.sae.base import SparseAutoencoder
from saekit.testing.checks import any_kind
from saekit.testing.checks.shared import changed, copied, same, saved_and_loaded, seeded
from saekit.testing.fixtures import build_sae, make_step
from saekit.testing.kit import Check, Failed, NotApplicable, Subject
from saekit.testing.tiny import table_for
from saekit.training.loss_input import Step
from saekit.training.measures import has_measures, measures_of

_DEAD = 8
_WITHHELD = ("labels", "tokens", "logits", "sequences", "graph")
"""What a step may hold, but only if it is declared in `needs`."""
_PROVIDED = ("groups", "importance")
"""What `Step.provided` may hold in the same way."""


@dataclasses.dataclass
class Bench:
    """A loss, and the steps it is tried on: all of one SAE, which its `prepare` has seen too."""

    subject: Subject
    loss: Callable[[Step], Tensor]
    sae: SparseAutoencoder
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def step(self, **changes: Any) -> Step:
        """A step with everything that a source can give, and dead latents; `changes` as for `make_step`."""
        settings = {"sae": self.sae, "dtype": self.dtype, "device": self.device, **changes}
        given: dict[str, Any] = {name: self.subject.needs(name) for name in ("sequences", "graph")}
        given["provided"] = [word for word in _PROVIDED if self.subject.needs(word)]
        return make_step(**{"labels": True, "tokens": True, "dead": _DEAD, **given, **settings})

    def value(self, step: Step, seed: int = 0) -> Tensor:
        """The loss of a step, as one number. NotApplicable if the loss does not apply to it."""
        with seeded(seed):
            value = self.raw(step, seed)
        if not isinstance(value, Tensor):
            raise NotApplicable("it does not return a tensor: see `scalar`.")
        return value.mean()

    def raw(self, step: Step, seed: int = 0) -> Any:
        """What the loss returns for a step, with torch's generator at `seed`."""
        active = getattr(self.loss, "active", None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if active is not None and not active(step):
                raise NotApplicable("its `active` says that it does not apply to such a step.")
            return self.loss(step)

    def gradients(self, value: Tensor) -> dict[str, Tensor]:
        """The gradient of each parameter of SAE and loss that `value` reaches."""
        named = dict(self.sae.named_parameters())
        if isinstance(self.loss, nn.Module):
            named |= {f"loss.{name}": p for name, p in self.loss.named_parameters()}
        if not value.requires_grad:
            return {}
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def bench(subject: Subject, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Bench:
    """The loss with an SAE of an architecture that provides what it needs."""
    table = table_for(set(subject.component.needs) - {"graph"}, subject.registry)
    plan = plan_run(parse_config(table, "the tiny run"), subject.registry).members[0]
    where = torch.device(device)
    source = plan.build_source()
    source.open(device=where, dtype=dtype)
    first = next(source.blocks("train", size=64, seed=0))
    sample = (first.x if first.target is None else first.target).float().cpu()
    d_out = None if first.target is None else source.d_out
    sae = build_sae(plan.architecture.component, plan.architecture.options, sample, d_in=source.d_in, d_out=d_out)
    sae.to(where, dtype)
    loss = subject.build()
    if not callable(loss):
        raise Failed("it cannot be called. Make its target a function, or a class with __call__(self, step).")
    if isinstance(loss, nn.Module):
        loss.to(where, dtype)
    if hasattr(loss, "prepare"):
        loss.prepare(RunContext(sae, source, plan.config, where, subject.place, lambda message: None))
    return Bench(subject, loss, sae, dtype, device)


def is_finite(value: Tensor, gradients: dict[str, Tensor], when: str) -> None:
    """Failed if a value or a gradient is not finite."""
    value = value.detach()
    if not bool(torch.isfinite(value)):
        raise Failed(f"it is {float(value)} {when}. Guard the division, the logarithm or the mean of nothing.")
    for name, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise Failed(
                f"its gradient to {name} is not finite {when}. A square root or a norm has an infinite slope at zero: add "
                "a small number inside it."
            )


# --- the checks ------------------------------------------------------------------------------------------------


def scalar(subject: Subject) -> None:
    at = bench(subject)
    value = at.raw(at.step())
    if not isinstance(value, Tensor):
        raise Failed(f"it returns {type(value).__name__}. Return a scalar tensor, for example with .mean().")
    if value.numel() != 1:
        raise Failed(f"it returns a tensor of shape {list(value.shape)}. Return a scalar, for example with .mean().")


def finite(subject: Subject) -> None:
    at = bench(subject)
    value = at.value(at.step())
    is_finite(value, at.gradients(value), "on an ordinary batch")


def gradient_reaches(subject: Subject) -> None:
    at = bench(subject)
    value = at.value(at.step())
    if not any(bool(g.any()) for g in at.gradients(value).values()):
        raise Failed(
            "no gradient reaches any parameter, so it would change nothing. Look for .detach(), .item(), torch.no_grad() or "
            "an operation without a gradient (argmax, a comparison, count())."
        )


def gradient_only_there(subject: Subject) -> None:
    at = bench(subject)
    step = at.step()
    held = [name for name in ("x", "target", "labels") if getattr(step, name) is not None]
    at.value(step)
    for name in held:
        tensor = getattr(step, name)
        if tensor.requires_grad or tensor.grad is not None:
            raise Failed(f"it makes step.{name} require a gradient. Data is not trained: work on a copy.")
    for name, parameter in at.sae.named_parameters():
        if parameter.grad is not None:
            raise Failed(f"it fills the gradient of {name} itself. Return the loss and call no backward: the trainer does.")
        if not parameter.requires_grad:
            raise Failed(f"it switches off the gradient of {name}. Use .detach() on a value instead.")


def sparse_and_dense_codes_agree(subject: Subject) -> None:
    of_architecture = set(subject.component.needs) & _provided_by_architectures(subject)
    if of_architecture:
        raise NotApplicable(f"it needs {of_architecture.pop()!r} of an architecture whose codes have only one form.")
    values, gradients = [], []
    for sparse in (True, False):
        at = bench(subject, torch.float64)
        value = at.value(at.step(sparse=sparse))
        values.append(float(value.detach()))
        gradients.append(at.gradients(value))
    if not abs(values[0] - values[1]) <= 1e-9 * max(1.0, abs(values[0])):
        raise Failed(
            f"it is {values[0]:.9g} for a compressed code and {values[1]:.9g} for the same code held dense. Reach the code "
            "through its operations (sum, columns, nonzero, ...), which mean the same for both."
        )
    for name in {*gradients[0], *gradients[1]}:
        pair = [g.get(name) for g in gradients]
        first, second = (torch.zeros(()) if g is None else g for g in pair)
        if not torch.allclose(first, second, rtol=1e-7, atol=1e-10):
            raise Failed(
                f"its gradient to {name} differs for the same code held dense. Reach the code through its operations "
                "(sum, columns, nonzero, ...), which have the right gradients in both forms."
            )


def any_dtype(subject: Subject) -> None:
    at = bench(subject)
    plain = at.value(at.step()).detach()
    exact = bench(subject, torch.float64)
    value = exact.value(exact.step())
    is_finite(value, exact.gradients(value), "in float64")
    double = float(value.detach())
    # A difference here is more than rounding: a constant in another dtype, or sums that lose their digits.
    if not abs(float(plain) - double) <= 1e-3 * max(1e-3, abs(double)):
        raise Failed(f"it is {float(plain):.6g} in float32 and {double:.6g} in float64. Sum in a wider type.")
    half = bench(subject)
    with torch.autocast("cpu", torch.bfloat16):
        value = half.value(half.step())
    is_finite(value, half.gradients(value), "in bf16 (training.precision)")


def on_cuda(subject: Subject) -> None:
    if not torch.cuda.is_available():
        raise NotApplicable("there is no CUDA device here.")
    at = bench(subject)
    plain = at.value(at.step()).detach()
    there = bench(subject, device="cuda")
    value = there.value(there.step())
    is_finite(value, there.gradients(value), "on CUDA")
    value = value.detach()
    if not abs(float(plain) - float(value)) <= 1e-3 * max(1e-3, abs(float(plain))):
        raise Failed(
            f"it is {float(plain):.6g} on the CPU and {float(value):.6g} on CUDA. Make new tensors from those of the step."
        )


def batch_of_one(subject: Subject) -> None:
    at = bench(subject)
    value = at.value(at.step(batch=1))
    is_finite(value, at.gradients(value), "for a batch of one row")


def without_positives(subject: Subject) -> None:
    if not subject.needs("labels") and not subject.needs("sequences"):
        raise NotApplicable("it needs no labels.")
    for what, fill in (("labels that are all 0", 0.0), ("labels that are all 1", 1.0), ("no label known", torch.nan)):
        at = bench(subject)
        step = at.step()
        assert step.labels is not None  # the step was made with labels
        changes = {"labels": torch.full_like(step.labels, fill)}
        if step.sequences is not None:
            changes["sequences"] = torch.full_like(step.sequences.labels, fill)
        try:
            value = at.value(at.step(**changes))
        except NotApplicable:
            continue  # it has nothing to say
        is_finite(value, at.gradients(value), f"with {what}")


def deterministic(subject: Subject) -> None:
    results = []
    for _ in range(2):
        at = bench(subject)
        value = torch.as_tensor(at.raw(at.step()))
        results.append((value.detach(), at.gradients(value.mean())))
    if not same(*results):
        raise Failed(
            "the same step gives a different value or gradient the second time. Draw from torch, whose state is in the "
            "checkpoint, and from nothing else (random, numpy, the clock, the order of a set)."
        )


def declared_needs_suffice(subject: Subject) -> None:
    at = bench(subject)
    step = at.step()
    withheld = tuple(name for name in _WITHHELD if not subject.needs(name))
    guarded = _Guarded(**{f.name: getattr(step, f.name) for f in dataclasses.fields(Step)})
    object.__setattr__(guarded, "_withheld", withheld)
    at.value(guarded)
    if has_measures(at.loss):
        at.loss.measures(guarded)  # type: ignore[attr-defined]


def weight_zero_harmless(subject: Subject) -> None:
    at = bench(subject)
    gradients = at.gradients(0.0 * at.value(at.step()))
    wrong = [name for name, g in gradients.items() if not bool((g == 0).all())]
    if wrong:
        raise Failed(f"with a weight of zero its gradient to {wrong[0]} is NaN instead of zero: somewhere its slope is infinite.")


def inputs_unchanged(subject: Subject) -> None:
    at = bench(subject)
    step = at.step()
    before = copied(step), copied(at.sae.state_dict()), at.sae.training
    at.value(step)
    now = copied(step), copied(at.sae.state_dict()), at.sae.training
    what = changed(before[0], now[0]) or changed(before[1], now[1])
    if what:
        raise Failed(f"it changes {what} in place. Every loss of a run is given the same step: work on a copy.")
    if before[2] != now[2]:
        raise Failed("it switches the SAE between training and evaluation mode. Leave the SAE as it is.")


def state_round_trip(subject: Subject) -> None:
    at = bench(subject)
    has_state = hasattr(at.loss, "state_dict") and hasattr(at.loss, "load_state_dict")
    for number in range(3):
        at.value(at.step(seed=number, number=number), seed=number)
    other = bench(subject)
    if has_state:
        saved_and_loaded(at.loss, other.loss)
    last = {"seed": 3, "number": 3}
    if not same(at.value(at.step(**last), seed=3).detach(), other.value(other.step(**last), seed=3).detach()):
        if has_state:
            raise Failed("after load_state_dict it continues differently. Put everything it keeps into state_dict.")
        raise Failed(
            "its value depends on the steps before, but it has no state_dict, so a resumed run would differ. Add "
            "state_dict and load_state_dict, or derive from nn.Module and keep buffers."
        )


def measures_are_scalars(subject: Subject) -> None:
    at = bench(subject)
    if not has_measures(at.loss):
        raise NotApplicable("it has no `measures`.")
    step = at.step()
    at.value(step)
    before = copied(step), copied(at.sae.state_dict())
    warnings: list[str] = []
    try:
        said = [
            measures_of(at.loss, step, label=subject.component.name, origin="it", warn=warnings.append) for _ in range(2)
        ]
    except PluginError as error:
        raise Failed(str(error)) from error
    if warnings:
        raise Failed(f"on an ordinary batch, {warnings[0]}")
    if said[0] != said[1]:
        raise Failed("`measures` says something else of the same step the second time. Compute it from the step alone.")
    what = changed(before[0], copied(step)) or changed(before[1], copied(at.sae.state_dict()))
    if what:
        raise Failed(f"its `measures` changes {what} in place. Work on a copy.")


class _Guarded(Step):
    """A step that gives only what was declared."""

    def __getattribute__(self, name: str) -> Any:
        if name in _WITHHELD and name in object.__getattribute__(self, "__dict__").get("_withheld", ()):
            raise Failed(
                f"it reads step.{name}, which is there only if a source gives it. Declare it: Component(..., needs=({name!r},))."
            )
        return object.__getattribute__(self, name)


def _provided_by_architectures(subject: Subject) -> set[str]:
    return {need for c in subject.registry.components("architecture") for need in c.provides}


CHECKS: tuple[Check, ...] = (
    *any_kind.CHECKS,
    Check("scalar", "It returns a scalar tensor.", scalar),
    Check("finite", "Value and gradients are finite on an ordinary batch.", finite),
    Check("gradient_reaches", "A gradient reaches the SAE, or the loss's own parameters.", gradient_reaches),
    Check(
        "gradient_only_there",
        "It does not ask for a gradient of the data, call backward, or switch off a gradient.",
        gradient_only_there,
    ),
    Check(
        "sparse_and_dense_codes_agree",
        "A compressed code and the same code held dense give the same value and gradients, in float64.",
        sparse_and_dense_codes_agree,
    ),
    Check("any_dtype", "It works in float32, float64 and under bf16, and gives the same up to rounding.", any_dtype),
    Check("on_cuda", "It works on a CUDA device, if there is one.", on_cuda),
    Check("batch_of_one", "One row alone gives a finite value and gradient.", batch_of_one),
    Check(
        "without_positives",
        "If it needs labels: labels all 0, all 1 or all unknown give a finite value and gradient.",
        without_positives,
    ),
    Check("deterministic", "The same step gives the same value and gradients.", deterministic),
    Check("declared_needs_suffice", "It reads only what its `needs` declare from a step.", declared_needs_suffice),
    Check("weight_zero_harmless", "With a weight of zero every gradient is zero.", weight_zero_harmless),
    Check("inputs_unchanged", "It changes neither the step nor the SAE.", inputs_unchanged),
    Check(
        "measures_are_scalars",
        "If it has `measures`: they are finite scalars by name, and asking for them changes nothing.",
        measures_are_scalars,
    ),
    Check(
        "state_round_trip",
        "What it keeps from step to step survives `state_dict` and `load_state_dict`, as a checkpoint holds it.",
        state_round_trip,
    ),
)
