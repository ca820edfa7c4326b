"""`usage_kl` has the value and the gradient of its formula, is bounded, and says when its target cannot be met."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saekit_revival.usage_kl import UsageKL, kl, kl_slope
from torch import Tensor

import saekit.testing
from saekit import OptionError, SparseAutoencoder
from saekit.testing import make_step

test_conformance = saekit.testing.conformance("loss", "usage_kl", options={"target": 0.2, "latents": 16})

D_SAE, BATCH, WIDTH, TARGET, FLOOR = 24, 64, 6.0, 0.3, 1e-3
DEAD, OVERUSED = 5, 11
ARCHITECTURES = {"standard": {}, "jumprelu": {"threshold": 0.2}, "gated": {}, "topk": {"k": 6}}


def step_of(architecture: str, seed: int = 0, sae: SparseAutoencoder | None = None):
    """A step in float64 whose latent 5 never fires, and whose latent 11 always does, both within the window."""
    if sae is None:
        sae = make_step(architecture=architecture, options=ARCHITECTURES[architecture], d_sae=D_SAE, dtype=torch.float64).sae
        shift = torch.zeros(D_SAE, dtype=torch.float64)
        shift[DEAD], shift[OVERUSED] = -2.2, 2.2
        sae.shift_pre_activations(shift)
    return make_step(sae=sae, batch=BATCH, seed=seed, dtype=torch.float64)


def margins(architecture: str, sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """How far each latent is from firing, as each architecture's formula has it: [batch, d_sae]."""
    shared = (x - sae.b_dec) @ sae.W_enc
    if architecture == "gated":
        return shared + torch.minimum(sae.b_gate, sae.b_mag * torch.exp(-sae.r_mag))
    pre = shared + sae.b_enc
    if architecture == "topk":
        return pre - pre.topk(6, dim=1).values[:, -1:]
    return pre - (sae.threshold if architecture == "jumprelu" else 0.0)


def divergence(rate: float) -> float:
    """The formula, written out for one latent."""
    t, r = (FLOOR + (1 - 2 * FLOOR) * p for p in (TARGET, rate))
    return t * math.log(t / r) + (1 - t) * math.log((1 - t) / (1 - r))


def slope(rate: Tensor) -> Tensor:
    t, r = (FLOOR + (1 - 2 * FLOOR) * p for p in (TARGET, rate))
    return (1 - 2 * FLOOR) * (-t / r + (1 - t) / (1 - r))


def loss_of(**options) -> UsageKL:
    return UsageKL(**{"target": TARGET, "width": WIDTH, "memory": 0.0, "latents": D_SAE, "floor": FLOOR, **options})


def bias_of(sae: SparseAutoencoder) -> Tensor:
    return sae.b_gate if hasattr(sae, "b_gate") else sae.b_enc


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_value_and_gradient_are_those_of_the_formula(architecture: str) -> None:
    step = step_of(architecture)
    sae, x = step.sae, step.x
    value = loss_of()(step)
    rate = step.code.dense().detach().ne(0).double().mean(0)
    assert rate[DEAD] == 0 and rate[OVERUSED] == 1
    assert float(value) == pytest.approx(sum(divergence(r) for r in rate.tolist()), rel=1e-12)
    with torch.no_grad():
        m = margins(architecture, sae, x)
        d_margin = slope(rate) * (m.abs() < WIDTH / 2) / (WIDTH * BATCH)  # [batch, d_sae]
        wanted = {"W_enc": (x - sae.b_dec).t() @ d_margin, "b_dec": -(sae.W_enc @ d_margin.sum(0)), "bias": d_margin.sum(0)}
    parameters = {"W_enc": sae.W_enc, "b_dec": sae.b_dec, "bias": bias_of(sae)}
    found = dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-14)
    assert found["bias"][DEAD] < 0 < found["bias"][OVERUSED]  # a step against it makes the dead one fire more
    assert found["W_enc"][:, [DEAD, OVERUSED]].ne(0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_descent_moves_both_rates_towards_the_target(architecture: str) -> None:
    step = step_of(architecture)
    sae, loss = step.sae, loss_of()
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.02)
    for _ in range(250):
        optimiser.zero_grad()
        loss(step := step_of(architecture, sae=sae)).backward()
        optimiser.step()
    rate = step.code.fired() / BATCH
    assert rate[DEAD] > 0.1 and rate[OVERUSED] < 0.6


def test_only_the_chosen_latents_have_a_gradient_and_nothing_outside_the_window_does() -> None:
    step = step_of("topk")
    gradient = torch.autograd.grad(loss_of(latents=2, target=0.25)(step), step.sae.b_enc)[0]
    assert gradient.ne(0).sum() <= 2
    torch.manual_seed(0)
    chosen = [loss_of(latents=2)._chosen(slope(step.code.fired() / BATCH)) for _ in range(300)]
    times = torch.bincount(torch.cat(chosen), minlength=D_SAE)
    assert times[DEAD] > 250 and times[OVERUSED] > 250  # their slopes are by far the largest; by chance it would be 25
    narrow = torch.autograd.grad(loss_of(width=0.5)(step), step.sae.b_enc)[0]
    assert narrow[DEAD] == 0  # 2.2 below its threshold: not within 0.25 of it


def test_the_gradient_of_a_running_rate_lacks_the_factor_of_the_average() -> None:
    """Through the average it would be (1 - memory) / (1 - memory^t) of this, at step t."""
    memory, loss = 0.9, loss_of(memory=0.9)
    steps = [step_of("standard", seed=seed) for seed in range(4)]
    for step in steps[:3]:
        loss(step)
    share = torch.stack([step.code.fired().double() / BATCH for step in steps])  # [4, d_sae]
    weights = (1 - memory) / (1 - memory**4) * memory ** torch.arange(3, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    running = (weights[:, None] * share).sum(0)
    value = loss(steps[3])
    assert float(value) == pytest.approx(sum(divergence(r) for r in running.tolist()), rel=1e-9)
    sae, x = steps[3].sae, steps[3].x
    window = margins("standard", sae, x).abs().lt(WIDTH / 2).double().mean(0) / WIDTH  # d rate / d bias
    gradient = torch.autograd.grad(value, sae.b_enc)[0]
    torch.testing.assert_close(gradient, slope(running) * window)
    through = running.clone().requires_grad_()
    kl(TARGET, through, FLOOR).sum().backward()
    torch.testing.assert_close(gradient * weights[3], through.grad * weights[3] * window)


@given(rate=st.floats(0, 1), target=st.floats(0.002, 0.998), floor=st.floats(1e-6, 1e-3))
def test_it_is_bounded_convex_and_zero_at_the_target_alone(rate: float, target: float, floor: float) -> None:
    there = torch.tensor([rate, target], dtype=torch.float64, requires_grad=True)
    value = kl(target, there, floor)
    assert -1e-12 <= float(value[0]) <= math.log(1 / floor)
    assert float(value[1]) == pytest.approx(0, abs=1e-12)
    (derivative,) = torch.autograd.grad(value.sum(), there)
    torch.testing.assert_close(kl_slope(target, there.detach(), floor), derivative, rtol=1e-6, atol=1e-9)
    assert abs(float(derivative[0])) <= 1 / floor
    assert float(derivative[0]) * (rate - target) >= -1e-12


def context(sae: SparseAutoencoder, said: list[str]):
    return SimpleNamespace(sae=sae, warn=said.append)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_gate_that_fixes_the_mean_rate_is_told(architecture: str) -> None:
    said: list[str] = []
    step = make_step(architecture=architecture, options={"k": 8}, d_sae=64)
    UsageKL(target=0.05).prepare(context(step.sae, said))
    assert len(said) == 1 and "k / d_sae = 8 / 64 = 0.125" in said[0] and "Set its target to 0.125" in said[0]
    UsageKL(target=0.125).prepare(context(step.sae, said))
    UsageKL(target=0.05).prepare(context(make_step(architecture="standard").sae, said))
    assert len(said) == 1


def test_a_target_that_the_penalty_contradicts_is_told() -> None:
    said: list[str] = []
    step = make_step(architecture="standard", fraction=0.3)
    few = make_step(architecture="standard", fraction=0.3)
    few.sae.shift_pre_activations(-0.4)
    few = make_step(sae=few.sae, fraction=0.3)
    for at, warnings in ((step, 0), (few, 1)):
        loss = UsageKL(target=0.5)
        loss.prepare(context(at.sae, said))
        loss(at)
        assert float(loss.measures(at)["mean_rate"]) == pytest.approx(float(at.code.count().mean()) / 64)
        assert len(said) == warnings
    assert "asks for 32 active latents" in said[0] and "l1" in said[0]


@pytest.mark.parametrize("target", [0.0005, 0.9999])
def test_a_target_below_the_floor_is_refused(target: float) -> None:
    with pytest.raises(OptionError, match="floor") as error:
        UsageKL(target=target)
    assert "Lower it" in str(error.value) and "\n" not in str(error.value)
