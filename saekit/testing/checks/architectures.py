"""What is asked of an architecture. Each check builds small SAEs and looks at what they compute."""

from __future__ import annotations

import copy
import importlib.util
import json
from typing import Any

import torch
from torch import Tensor

from saekit.choice import fits
from saekit.errors import UsageError
from saekit.sae.base import SparseAutoencoder
from saekit.sae.code import Code, DenseCode
from saekit.sae.formats import load_sae, save_sae
from saekit.testing.checks import any_kind
from saekit.testing.checks.shared import changed, copied, same
from saekit.testing.fixtures import D_IN, D_SAE, build_sae
from saekit.testing.kit import Check, Failed, NotApplicable, Subject

_D_OUT = 12
_SETTLE = 20
"""Batches after which an architecture that chooses between ways of computing has chosen."""


def activations(n: int = 24, seed: int = 0, width: int = D_IN) -> Tensor:
    """Random activations, [n, width]."""
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def built(subject: Subject, *, d_out: int | None = None, sparse: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """An SAE that has seen a few batches in training. d_out: of a transcoder. sparse: few of its latents are active."""
    component = subject.component
    # As the run file would: `k` is a small one, unless it was given.
    options = {name: value for name, value in subject.options.items() if value != _default(subject, name)}
    sae = build_sae(component, options, activations(width=d_out or D_IN), d_out=d_out)
    if not isinstance(sae, SparseAutoencoder):
        raise Failed(f"it builds {type(sae).__name__}. Derive its target from saekit.SparseAutoencoder.")
    if sparse:
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                if parameter.shape == (D_SAE,) and name in ("b_enc", "b_gate"):
                    parameter.sub_(0.6)
    sae.to(dtype)
    with torch.no_grad():
        for seed in range(_SETTLE):
            sae.encode(activations(seed=seed + 1).to(dtype))
    return sae


def _default(subject: Subject, name: str) -> Any:
    return subject.component.options_model().model_fields[name].get_default(call_default_factory=True)


def close(a: Tensor, b: Tensor, exact: bool = False) -> bool:
    """Whether two tensors are equal up to rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9 if exact else 1e-4, atol=1e-11 if exact else 1e-5)


# --- the checks ------------------------------------------------------------------------------------------------


def shapes(subject: Subject) -> None:
    x = activations()
    for d_out in (None, _D_OUT):
        sae = built(subject, d_out=d_out)
        code = sae.encode(x)
        what = "an SAE" if d_out is None else f"a transcoder with d_out={d_out}"
        if not isinstance(code, Code):
            raise Failed(f"encode gives {type(code).__name__}. Return self.sparse_code(...) or self.dense_code(...).")
        if (len(code), code.d_sae) != (len(x), D_SAE):
            raise Failed(f"the code is [{len(code)}, {code.d_sae}] for {what}, not [{len(x)}, {D_SAE}]. Mend `gate`.")
        rebuilt, wanted = sae.reconstruct(x, code), [len(x), d_out or D_IN]
        if list(rebuilt.shape) != wanted:
            raise Failed(f"the reconstruction is {list(rebuilt.shape)} for {what}, not {wanted}. Mend `decode`.")
        sae.eval()
        if not close(sae(x), sae.reconstruct(x, sae.encode(x))):
            raise Failed("forward(x) is not reconstruct(x, encode(x)). Leave `forward` to SparseAutoencoder.")


def gradient_is_the_derivative(subject: Subject) -> None:
    for sparse in (False, True):
        for d_out in (None, _D_OUT):
            _compare_with_differences(built(subject, d_out=d_out, sparse=sparse, dtype=torch.float64))


def _compare_with_differences(sae: Any) -> None:
    """Hold autograd's derivative along a random direction of each weight against the difference quotient."""
    x = activations(8).double()
    target = activations(8, seed=9, width=sae.d_out).double()
    weights = activations(1, seed=8, width=sae.d_sae).double().squeeze(0)

    def objective() -> Tensor:
        code = sae.encode(x)
        return (target - sae.reconstruct(x, code)).square().sum() + code.weighted_sum(weights).sum() + code.square_sum().sum()

    shared = [n for n in ("W_enc", "b_enc", "W_dec", "b_dec") if getattr(sae, n, None) is not None]
    found = torch.autograd.grad(objective(), [getattr(sae, n) for n in shared], allow_unused=True)
    for name, gradient in zip(shared, found, strict=True):
        parameter = getattr(sae, name)
        draws = torch.Generator().manual_seed(len(name))
        direction = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
        direction /= direction.norm()
        told = 0.0 if gradient is None else float((gradient * direction).sum())
        quotients = [_quotient(objective, parameter, direction, step) for step in (1e-6, 1e-7)]
        # A latent that switches on or off within a step makes a jump; it does so within one of the two at most.
        if all(abs(told - q) > 1e-4 * max(1.0, abs(q)) for q in quotients):
            raise Failed(
                f"its gradient to {name} is {told:.6g} along a direction in which the value really changes by "
                f"{quotients[0]:.6g}. Take active values from self.pre_at(x, pre, pattern) or self.pre_activations(x), which "
                "carry a gradient; self.dense_pre(x) has none."
            )


def _quotient(objective: Any, parameter: Tensor, direction: Tensor, step: float) -> float:
    sides = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            parameter.add_(direction, alpha=sign * step)
            sides.append(float(objective()))
            parameter.sub_(direction, alpha=sign * step)
    return (sides[0] - sides[1]) / (2 * step)


def decodes_either_form(subject: Subject) -> None:
    x = activations().double()
    for sparse in (False, True):
        sae = built(subject, sparse=sparse, dtype=torch.float64)
        target = activations(seed=9).double()
        code = sae.encode(x)
        results = []
        for form in (code, DenseCode(code.dense(), code.pre)):
            rebuilt = sae.reconstruct(x, form)
            named = [(n, p) for n, p in sae.named_parameters() if p.requires_grad]
            loss = (target - rebuilt).square().sum()
            found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, retain_graph=True)
            results.append((rebuilt, {n: g for (n, _), g in zip(named, found, strict=True) if g is not None}))
        (first, gradients), (second, others) = results
        if not close(first, second, exact=True):
            raise Failed("a compressed code and the same code held whole are decoded otherwise. Leave `decode` as it is.")
        for name in {**gradients, **others}:
            pair = [g.get(name, torch.zeros_like(getattr(sae, name, first))) for g in (gradients, others)]
            if not close(pair[0], pair[1], exact=True):
                raise Failed(
                    f"the gradient to {name} through a compressed code is not that through the same code held whole. Mend "
                    "the gradient of `decode`."
                )


def batch_of_one(subject: Subject) -> None:
    sae = built(subject)
    x = activations(1)
    for training in (True, False):
        sae.train(training)
        rebuilt = sae(x)
        if list(rebuilt.shape) != [1, D_IN] or not bool(torch.isfinite(rebuilt).all()):
            raise Failed(f"one row alone gives {list(rebuilt.shape)}, or what is not finite. Mend `gate` for a batch of one.")
    sae.train()
    (x - sae(x)).square().mean().backward()
    for name, parameter in sae.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            raise Failed(f"one row alone gives a gradient to {name} that is not finite.")


def rows_alone_in_eval(subject: Subject) -> None:
    sae = built(subject).eval()
    x = activations()
    whole = sae.encode(x).dense()
    if not close(sae.encode(x).dense(), whole):
        raise Failed("in evaluation the same batch gives another code the second time. Draw and adapt in training only.")
    alone = torch.cat([sae.encode(x[n : n + 1]).dense() for n in range(len(x))])
    if not close(alone, whole):
        raise Failed(
            "in evaluation a row's code depends on the rows beside it. Keep what the batch decides in training (a threshold, "
            "say) in a buffer, and use that where not self.training."
        )


def options_rebuild(subject: Subject) -> None:
    sae = built(subject).eval()
    given = sae.options()
    try:
        plain = json.loads(json.dumps(given))
    except TypeError as error:
        raise Failed(f"options() is not plain: {error}. cfg.json keeps it: return numbers, texts and lists.") from None
    try:
        again = subject.component.build(subject.component.validate(plain, "options()"), sae.d_in, sae.d_sae)
    except UsageError as error:
        raise Failed(f"options() does not fit its own constructor: {error} Return each option under its name.") from None
    what = changed(copied(given), copied(again.options()))
    if what:
        raise Failed(f"built again from options(), option {what!r} is another. Return each as the constructor takes it.")
    for name, value in subject.options.items():
        if name in given and value is not None and name not in ("k",) and not fits(value, given[name]):
            raise Failed(f"options() gives {name} = {given[name]!r}, but it was built with {value!r}.")
    again.load_state_dict(sae.state_dict())
    x = activations()
    if not close(again.eval()(x), sae(x)):
        raise Failed("built again from options(), with the same weights, it computes something else. Is an option left out?")


def saved_and_loaded(subject: Subject) -> None:
    for d_out in (None, _D_OUT):
        sae = built(subject, d_out=d_out).eval()
        place = subject.place / f"sae-{d_out}"
        save_sae(sae, place, name=subject.component.qualified_name)
        back = load_sae(place, registry=subject.registry)
        what = changed(copied(sae.state_dict()), copied(back.state_dict()))
        if what:
            raise Failed(f"{what} is another after save_sae and load_sae. Extend to_saelens and state_from_saelens.")
        x = activations()
        if not close(back(x), sae(x)):
            raise Failed("after save_sae and load_sae it computes something else. Is an option missing from options()?")


def rescale_is_homogeneous(subject: Subject) -> None:
    x, scale = activations(), 3.0
    for sparse in (False, True):
        sae = built(subject, sparse=sparse).eval()
        raw = copy.deepcopy(sae)
        raw.rescale(scale)
        if not close(raw(x), sae(scale * x) / scale):
            raise Failed(
                "after rescale(scale) it does not rebuild x as it rebuilt scale * x before. Divide by `scale` whatever is in "
                "units of the activations: biases, thresholds, caps."
            )
        if not close(raw.encode(x).dense() * scale, sae.encode(scale * x).dense()):
            raise Failed("after rescale(scale) activations are not smaller by that factor. Divide thresholds and caps too.")


def initialise_draws_from_its_generator(subject: Subject) -> None:
    states = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            sae = subject.build(D_IN, D_SAE, None)
            before = torch.get_rng_state()
            sae.initialise(torch.Generator().manual_seed(0), activations())
            if not torch.equal(before, torch.get_rng_state()):
                raise Failed("initialise draws from torch's global generator. Hand `generator=generator` to every draw.")
            states.append(copied(sae.state_dict()))
    what = changed(*states)
    if what:
        raise Failed(f"{what} is not decided by the generator given to initialise. Fill every parameter there.")


def weights_learn(subject: Subject) -> None:
    sae = built(subject).train()
    x = activations(256)
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2)
    first = last = 0.0
    for number in range(50):
        optimiser.zero_grad()
        loss = (x - sae(x)).square().mean()
        loss.backward()
        sae.constrain_gradients()
        optimiser.step()
        sae.constrain_weights()
        first, last = (float(loss.detach()), last) if number == 0 else (first, float(loss.detach()))
    if not last < first:
        raise Failed(f"50 steps of Adam do not lower its squared error ({first:.4g} to {last:.4g}). Does a gradient reach it?")


def saelens_layout(subject: Subject) -> None:
    sae = built(subject).eval()
    keys, tensors = sae.to_saelens()
    try:
        json.dumps(keys)
    except TypeError as error:
        raise Failed(f"the keys that to_saelens gives are not plain: {error}.") from None
    back = type(sae).state_from_saelens({name: t.detach().clone() for name, t in tensors.items()})
    what = changed(copied(dict(sae.state_dict())), copied(dict(back)))
    if what:
        raise Failed(f"state_from_saelens(to_saelens()) gives another {what}. The one must be the way back of the other.")
    if sae.saelens_architecture is None:
        return  # `saekit export --to sae_lens` refuses it with the reason
    if importlib.util.find_spec("sae_lens") is None:
        raise NotApplicable("its layout is whole, but sae_lens is not installed, so whether that opens it is not known.")
    from sae_lens import SAE

    save_sae(sae, subject.place / "sae", name=subject.component.qualified_name)
    theirs = SAE.load_from_disk(str(subject.place / "sae"), device="cpu")
    x = activations()
    with torch.no_grad():
        if not close(theirs.decode(theirs.encode(x)), sae(x)):
            raise Failed(
                f"sae_lens opens it as {sae.saelens_architecture!r} and computes something else. Set saelens_name = None, or "
                "give the tensors with which that architecture computes the same."
            )


def deterministic(subject: Subject) -> None:
    results = []
    for _ in range(2):
        sae = built(subject).train()
        rebuilt = sae(activations())
        rebuilt.square().mean().backward()
        results.append([rebuilt, {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}])
    if not same(*results):
        raise Failed("from the same weights and batches, training comes to other numbers the second time.")


CHECKS: tuple[Check, ...] = (
    *any_kind.CHECKS,
    Check("shapes", "Code and reconstruction have the right shapes, for an SAE and for a transcoder.", shapes),
    Check(
        "gradient_is_the_derivative",
        "The gradient of encoder, decoder and biases is what small changes of them do to the value, in float64.",
        gradient_is_the_derivative,
    ),
    Check(
        "decodes_either_form",
        "A compressed code and the same code held whole are decoded alike, with the same gradients, in float64.",
        decodes_either_form,
    ),
    Check("batch_of_one", "One row alone is encoded and decoded, with finite gradients.", batch_of_one),
    Check(
        "rows_alone_in_eval",
        "In evaluation a row's code is the same every time, and does not depend on the rows beside it.",
        rows_alone_in_eval,
    ),
    Check("deterministic", "From the same weights, training comes to the same numbers to the bit.", deterministic),
    Check("options_rebuild", "`options()` is plain, and builds the same SAE again.", options_rebuild),
    Check("saved_and_loaded", "`save_sae` and `load_sae` give the same weights and the same code.", saved_and_loaded),
    Check(
        "rescale_is_homogeneous",
        "After `rescale(s)` it makes of x what it made of s * x before, divided by s.",
        rescale_is_homogeneous,
    ),
    Check(
        "initialise_draws_from_its_generator",
        "`initialise` fills every weight from the generator it is given, and draws from no other.",
        initialise_draws_from_its_generator,
    ),
    Check("weights_learn", "A few steps of Adam lower the squared error.", weights_learn),
    Check(
        "saelens_layout",
        "What `to_saelens` gives is read back whole, and computes the same in sae_lens where it has a name there.",
        saelens_layout,
    ),
)
