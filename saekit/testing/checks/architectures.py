"""The checks of an architecture. Each builds small SAEs and looks at what they compute."""

from __future__ import annotations

import copy
import importlib.util
import json
from typing import Any

import torch
from torch import Tensor

from saekit.component_option import fits
from saekit.errors import UsageError
from saekit.sae.base import SparseAutoencoder
from saekit.sae.code import Code, DenseCode
from saekit.sae.formats import load_sae, save_sae
from saekit.sae.saelens_format import SaeLensFormat
from saekit.testing.checks import any_kind
from saekit.testing.checks.shared import changed, copied, same
from saekit.testing.fixtures import D_IN, D_SAE, build_sae
from saekit.testing.kit import Check, Failed, NotApplicable, Subject

_D_OUT = 12
_SETTLE = 20
"""How many batches it takes until an architecture has chosen its way of computing, if it has several."""


def activations(n: int = 24, seed: int = 0, width: int = D_IN) -> Tensor:
    """Random activations, [n, width]."""
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def built(subject: Subject, *, d_out: int | None = None, sparse: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """An SAE that has seen a few batches in training. d_out: that of a transcoder. sparse: few of its latents are active."""
    component = subject.component
    # Only what was really given, so that `build_sae` can make few latents active.
    options = {name: value for name, value in subject.options.items() if value != _default(subject, name)}
    sae = build_sae(component, options, activations(width=d_out or D_IN), d_out=d_out)
    if not isinstance(sae, SparseAutoencoder):
        raise Failed(f"it builds {type(sae).__name__}. Derive its target from saekit.SparseAutoencoder.")
    if sparse:
        sae.shift_pre_activations(-0.6)
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
            raise Failed(f"the code is [{len(code)}, {code.d_sae}] for {what}, not [{len(x)}, {D_SAE}]. Fix `gate`.")
        rebuilt, wanted = sae.reconstruct(x, code), [len(x), d_out or D_IN]
        if list(rebuilt.shape) != wanted:
            raise Failed(f"the reconstruction is {list(rebuilt.shape)} for {what}, not {wanted}. Fix `decode`.")
        sae.eval()
        if not close(sae(x), sae.reconstruct(x, sae.encode(x))):
            raise Failed("forward(x) is not reconstruct(x, encode(x)). Leave `forward` to SparseAutoencoder.")


def gradient_is_the_derivative(subject: Subject) -> None:
    for sparse in (False, True):
        for d_out in (None, _D_OUT):
            _compare_with_differences(built(subject, d_out=d_out, sparse=sparse, dtype=torch.float64))


def _compare_with_differences(sae: Any) -> None:
    """Compare autograd's derivative along a random direction of each weight with the difference quotient."""
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
        # A latent that switches on or off within a step makes the value jump, but hardly within both steps.
        if all(abs(told - q) > 1e-4 * max(1.0, abs(q)) for q in quotients):
            raise Failed(
                f"its gradient to {name} is {told:.6g} along a direction in which the value changes by {quotients[0]:.6g}. Take "
                "active values from self.pre_at(x, pre, pattern) or self.pre_activations(x), which carry a gradient; "
                "self.dense_pre(x) has none."
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
            raise Failed("a sparse code and the same code made dense are decoded differently. Leave `decode` as it is.")
        for name in {**gradients, **others}:
            pair = [g.get(name, torch.zeros_like(getattr(sae, name, first))) for g in (gradients, others)]
            if not close(pair[0], pair[1], exact=True):
                raise Failed(
                    f"the gradient to {name} through a sparse code differs from that through the same code made dense. Fix "
                    "the gradient of `decode`."
                )


def batch_of_one(subject: Subject) -> None:
    sae = built(subject)
    x = activations(1)
    for training in (True, False):
        sae.train(training)
        rebuilt = sae(x)
        if list(rebuilt.shape) != [1, D_IN] or not bool(torch.isfinite(rebuilt).all()):
            raise Failed(f"one row alone gives {list(rebuilt.shape)}, or is not finite. Fix `gate` for a batch of one.")
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
        raise Failed("in evaluation the same batch gives a different code the second time. Draw and adapt in training only.")
    alone = torch.cat([sae.encode(x[n : n + 1]).dense() for n in range(len(x))])
    if not close(alone, whole):
        raise Failed(
            "in evaluation a row's code depends on the other rows. Keep what the batch decides in training (a threshold, for "
            "example) in a buffer, and use that unless self.training."
        )


def calibrated_at_the_end(subject: Subject) -> None:
    sae = built(subject)
    x = 2.0 * activations(256)  # activations that training has not caught up with
    with torch.no_grad():
        trained = float(copy.deepcopy(sae).encode(x).count().double().mean())
    drawn = torch.get_rng_state()
    found = sae.calibrate(iter(x.split(64)))
    if not torch.equal(drawn, torch.get_rng_state()):
        raise Failed("calibrate draws random numbers, so a resumed run could end at other bits. Decide without them.")
    if not isinstance(found, dict) or not all(isinstance(value, float) for value in found.values()):
        raise Failed(f"calibrate gives {found!r}. Return the values that it set, as plain numbers by name, or {{}}.")
    measured = float(sae.eval().encode(x).count().double().mean())
    if abs(measured - trained) > 0.05 * max(trained, 1.0):
        raise Failed(
            f"after calibrate {measured:.2f} latents are active in evaluation, and {trained:.2f} in training on the same "
            "activations. Let `calibrate` set on its batches what training only follows, such as a running threshold."
        )


def options_rebuild(subject: Subject) -> None:
    sae = built(subject).eval()
    given = sae.options()
    try:
        plain = json.loads(json.dumps(given))
    except TypeError as error:
        raise Failed(f"options() is not plain: {error}. cfg.json holds it: keep numbers, texts and lists.") from None
    try:
        again = subject.component.build(subject.component.validate(plain, "options()"), sae.d_in, sae.d_sae)
    except UsageError as error:
        raise Failed(f"options() does not fit its own constructor: {error} Keep each option as it was given.") from None
    what = changed(copied(given), copied(again.options()))
    if what:
        raise Failed(f"built again from options(), option {what!r} is different. Keep it as the constructor takes it.")
    for name, value in subject.options.items():
        if name in given and value is not None and name != sae.l0_option and not fits(value, given[name]):
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
            raise Failed(f"{what} is different after save_sae and load_sae. Fix `to` and `state` of its SaeLensFormat.")
        x = activations()
        if not close(back(x), sae(x)):
            raise Failed("after save_sae and load_sae it computes something else. Is an option left out of options()?")


def latents_start_again(subject: Subject) -> None:
    sae = built(subject).eval()
    for name in sae.latent_parameters:
        if getattr(getattr(sae, name, None), "shape", None) != (D_SAE,):
            raise Failed(f"latent_parameters names {name!r}, which is not a tensor of shape [d_sae].")
    sae.initialise(torch.Generator().manual_seed(0), activations())
    fresh = sae.encode(activations()).dense()
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.shape == (D_SAE,):
                parameter.add_(activations(1, seed=5, width=D_SAE).squeeze(0).abs())
        for name, value in sae.latent_parameters.items():
            getattr(sae, name).fill_(value)
    if not close(sae.encode(activations()).dense(), fresh):
        raise Failed(
            "with the values of latent_parameters its latents are not as they were at the start. Name every parameter [d_sae] "
            "there, with its first value: a dead latent is revived with it."
        )


def silenced_are_silent(subject: Subject) -> None:
    sae, half = built(subject), torch.arange(0, D_SAE, 2)
    sae.silence(half)
    for mode in (True, False):
        fired = sae.train(mode).encode(activations(200)).fired()[half]
        if bool(fired.any()):
            raise Failed(
                "after silence(latents) these fire. Override it: a latent with a column of zeros in the encoder and the values of "
                "latent_parameters must not fire."
            )


def shift_moves_pre_activations(subject: Subject) -> None:
    x, by = activations().double(), 0.3 * activations(1, seed=6, width=D_SAE).squeeze(0).double()
    for sparse in (False, True):
        sae = built(subject, sparse=sparse, dtype=torch.float64).eval()
        before = sae.pre_activations(x)
        shifted = copy.deepcopy(sae)
        shifted.shift_pre_activations(by)
        if not close(shifted.pre_activations(x), before + by):
            raise Failed("shift_pre_activations(by) does not add `by` to its pre-activations. Move the biases of its encoder.")
        if not sae.reads_centred:
            continue
        sae.b_dec.data.copy_(activations(1, seed=7).squeeze(0))
        other = copy.deepcopy(sae)
        other.reads_centred = False
        other.shift_pre_activations(-(sae.b_dec @ sae.W_enc))
        if not close(other(x), sae(x)):
            raise Failed(
                "x without b_dec subtracted, its pre-activations shifted instead, gives another code. Read x through "
                "self.centred or self.encoder_input, and shift every bias that is added to the product with W_enc."
            )


def margin_tells_who_fires(subject: Subject) -> None:
    for sparse in (False, True):
        sae = built(subject, sparse=sparse, dtype=torch.float64)
        with torch.no_grad():  # latents that differ in whatever each has of its own
            for seed, parameter in enumerate(sae.parameters()):
                if parameter.shape == (D_SAE,):
                    parameter.add_(0.3 * activations(1, seed=20 + seed, width=D_SAE).squeeze(0))
            sae.constrain_weights()
        for training in (True, False):
            _compare_margins_with_code(sae, training)


def _compare_margins_with_code(sae: Any, training: bool) -> None:
    sae.train(training)
    code = sae.encode(activations().double())
    sae.train()
    sae.encode(activations(seed=1).double())  # a code speaks of its own batch and mode, whatever came after it
    latents = torch.arange(D_SAE - 1, -1, -2)
    margin, fires = code.margin(latents), code.columns(latents) != 0  # [batch, n] each
    when = "in training" if training else "in evaluation"
    for wrong, what in (
        ((margin > 1e-9) & ~fires, "positive though it is silent"),
        ((margin < -1e-9) & fires, "negative though it fires"),
    ):
        if bool(wrong.any()):
            raise Failed(
                f"{when} the margin of a latent is {what}, in {int(wrong.sum())} of {wrong.numel()} cases. Hand sparse_code or "
                "dense_code the `threshold` that its pre-activation must exceed to fire: [d_sae] if each latent has its own."
            )
    if not margin.requires_grad or not bool(torch.autograd.grad(margin.sum(), sae.W_enc)[0][:, latents].any(0).all()):
        raise Failed(f"{when} the margin of some latent has no gradient to W_enc. Fix `pre_activations`.")


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
        raise Failed(f"{what} depends on more than the generator given to initialise. Fill every parameter there.")


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


def saelens_format(subject: Subject) -> None:
    sae = built(subject).eval()
    form = SaeLensFormat.of(type(sae))
    keys, tensors = form.to(sae)
    try:
        json.dumps([keys, form.keys(sae)])
    except TypeError as error:
        raise Failed(f"the keys that its SaeLensFormat gives are not plain: {error}.") from None
    back = form.state({name: t.detach().clone() for name, t in tensors.items()})
    what = changed(copied(dict(sae.state_dict())), copied(dict(back)))
    if what:
        raise Failed(f"state(to(sae)) of its SaeLensFormat gives a different {what}. Each must be the inverse of the other.")
    if SaeLensFormat.of(subject.component.load()).known_as:  # what an import looks at
        _options_there_and_back(form, sae)
    if form.counterpart(sae) is None:
        return  # `saekit export --to sae_lens` refuses it with the reason
    if importlib.util.find_spec("sae_lens") is None:
        raise NotApplicable("its layout is whole, but sae_lens is not installed, so it is unknown whether that opens it.")
    from sae_lens import SAE

    save_sae(sae, subject.place / "sae", name=subject.component.qualified_name)
    theirs = SAE.load_from_disk(str(subject.place / "sae"), device="cpu")
    x = activations()
    with torch.no_grad():
        if not close(theirs.decode(theirs.encode(x)), sae(x)):
            raise Failed(
                f"sae_lens opens it as {form.counterpart(sae)!r} and computes something else. Leave the name out of its "
                "SaeLensFormat, or give the tensors with which that architecture computes the same."
            )


def _options_there_and_back(form: SaeLensFormat, sae: Any) -> None:
    try:
        back = form.options(form.keys(sae))
    except KeyError as error:
        raise Failed(f"options(cfg) of its SaeLensFormat reads {error}, which keys(sae) does not return.") from None
    made_with = sae.options()
    for name, value in back.items():
        if name != "decoder_norm" and value != made_with.get(name):
            raise Failed(f"options(keys(sae)) of its SaeLensFormat gives {name} = {value!r}, not {made_with.get(name)!r}.")


def deterministic(subject: Subject) -> None:
    results = []
    for _ in range(2):
        sae = built(subject).train()
        rebuilt = sae(activations())
        rebuilt.square().mean().backward()
        results.append([rebuilt, {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}])
    if not same(*results):
        raise Failed("from the same weights and batches, training gives different numbers the second time.")


CHECKS: tuple[Check, ...] = (
    *any_kind.CHECKS,
    Check("shapes", "Code and reconstruction have the right shapes, for an SAE and for a transcoder.", shapes),
    Check(
        "gradient_is_the_derivative",
        "The gradient of encoder, decoder and biases equals the difference quotient, in float64.",
        gradient_is_the_derivative,
    ),
    Check(
        "decodes_either_form",
        "A sparse code and the same code made dense are decoded alike, with the same gradients, in float64.",
        decodes_either_form,
    ),
    Check("batch_of_one", "One row alone is encoded and decoded, with finite gradients.", batch_of_one),
    Check(
        "rows_alone_in_eval",
        "In evaluation a row's code is the same every time, and does not depend on the other rows.",
        rows_alone_in_eval,
    ),
    Check("deterministic", "From the same weights, training gives the same numbers to the bit.", deterministic),
    Check("options_rebuild", "`options()` is plain, and builds the same SAE again.", options_rebuild),
    Check("saved_and_loaded", "`save_sae` and `load_sae` give the same weights and the same code.", saved_and_loaded),
    Check(
        "calibrated_at_the_end",
        "After `calibrate` as many latents are active in evaluation as in training, and it draws no random numbers.",
        calibrated_at_the_end,
    ),
    Check(
        "latents_start_again",
        "With the values of `latent_parameters` latents are as they were at the start.",
        latents_start_again,
    ),
    Check("silenced_are_silent", "After `silence(latents)` none of these fires.", silenced_are_silent),
    Check(
        "shift_moves_pre_activations",
        "`shift_pre_activations(by)` adds `by`, and can replace subtracting b_dec from the input, in float64.",
        shift_moves_pre_activations,
    ),
    Check(
        "margin_tells_who_fires",
        "`Code.margin` is positive where a latent fires, negative where it does not, and has a gradient, in float64.",
        margin_tells_who_fires,
    ),
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
        "saelens_format",
        "What its `SaeLensFormat` writes is read back whole, and sae_lens computes the same if it has a name there.",
        saelens_format,
    ),
)
