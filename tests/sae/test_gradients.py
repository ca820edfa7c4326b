"""For every architecture and every core loss, the engine's gradients are those of a dense computation written here.

The reference never compresses anything: it works on [batch, d_sae] with autograd, and is told only which entries the
engine chose where the choice is the engine's (top-k breaks ties arbitrarily).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit import SparseAutoencoder, SparseCode, Step
from saekit.builtin import losses
from saekit.builtin.architectures import Clipped, Standard, TopK
from saekit.builtin.batchtopk import BatchTopK, Matryoshka
from saekit.builtin.gated import Gated
from saekit.builtin.jumprelu import JumpReLU

D, F = 5, 24


@dataclass
class Dense:
    """The reference's code [batch, d_sae], its pre-activations, its gates if it has any, and the latents that the
    engine holds for the most frequent."""

    code: Tensor
    pre: Tensor
    gates: Tensor | None = None
    frequent: Tensor | None = None


class _Window(torch.autograd.Function):
    """The dense JumpReLU and its gate, from the paper's definitions, for z [batch, d_sae] and theta [d_sae]."""

    @staticmethod
    def forward(ctx, z: Tensor, theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        step = torch.heaviside(z - theta, torch.zeros((), dtype=z.dtype))
        return z * step, step

    @staticmethod
    def backward(ctx, d_jump: Tensor, d_step: Tensor):
        z, theta = ctx.saved_tensors
        kernel = torch.where(((z - theta) / ctx.bandwidth).abs() < 0.5, 1.0, 0.0).to(z.dtype)
        d_theta = (-theta / ctx.bandwidth * kernel * d_jump).sum(0) + (-1 / ctx.bandwidth * kernel * d_step).sum(0)
        return torch.heaviside(z - theta, torch.zeros((), dtype=z.dtype)) * d_jump, d_theta, None


def _mask(engine: SparseCode) -> Tensor:
    mask = torch.zeros(len(engine), engine.d_sae, dtype=torch.float64)
    mask[engine.pattern.rows, engine.pattern.indices] = 1.0
    return mask


def dense(sae: SparseAutoencoder, x: Tensor, engine: Any) -> Dense:
    """The same architecture, densely."""
    product = (x - sae.b_dec) @ sae.W_enc
    if isinstance(sae, Gated):
        gate = product + sae.b_gate
        magnitude = torch.exp(sae.r_mag) * product + sae.b_mag
        return Dense((gate > 0).double() * magnitude.relu(), gate, gate.relu())
    pre = product + sae.b_enc
    if isinstance(sae, JumpReLU):
        code, step = _Window.apply(pre, sae.threshold, sae.bandwidth)
        return Dense(code, pre, step)
    if isinstance(sae, (TopK, BatchTopK)):
        return Dense(pre.relu() * _mask(engine), pre)
    return Dense(sae.activation(pre), pre)


def dense_loss(name: str, sae: SparseAutoencoder, x: Tensor, ref: Dense, dead: Tensor) -> Tensor:
    """Each core loss from its formula."""
    recon = ref.code @ sae.W_dec + sae.b_dec
    if name == "mse":
        return ((x - recon) ** 2).sum() / x.numel()
    if name == "l1":
        return ref.code.sum() / len(x)  # never negative
    if name == "l1_by_norm":
        return (ref.code * sae.W_dec.norm(dim=1)).sum() / len(x)
    if name == "gate_sum":
        return ref.gates.sum() / len(x)
    if name == "gated_aux":
        rebuilt = ref.gates @ sae.W_dec.detach() + sae.b_dec.detach()
        return ((x - rebuilt) ** 2).sum() / x.numel()
    if name == "matryoshka":
        total = 0.0
        for size in sae.prefixes:
            total = total + ((x - ref.code[:, :size] @ sae.W_dec[:size] - sae.b_dec) ** 2).mean()
        return total / len(sae.prefixes)
    if name == "auxk":
        residual = (x - recon).detach()
        masked = ref.pre[:, dead]
        k = min(max(1, D // 2), masked.shape[1])
        kept = torch.zeros_like(masked).scatter(1, masked.topk(k, 1).indices, 1.0)
        rebuilt = (masked.relu() * kept) @ sae.W_dec[dead]
        spread = ((residual - residual.mean(0)) ** 2).mean().clamp_min(1e-12)
        return ((residual - rebuilt) ** 2).mean() / spread
    if name == "decorrelation":
        chosen = ref.frequent
        total = torch.zeros((), dtype=torch.float64)
        for i in chosen.tolist():
            for j in chosen.tolist():
                a, b = ref.code[:, i] - ref.code[:, i].mean(), ref.code[:, j] - ref.code[:, j].mean()
                if i != j and a.detach().abs().max() > 1e-9 and b.detach().abs().max() > 1e-9:
                    total = total + (a * b).sum() ** 2 / (a.square().sum() * b.square().sum())
        return total / (8 * 7)
    raise AssertionError(name)


ENGINE: dict[str, Callable[[Step], Tensor]] = {
    "mse": losses.mse,
    "l1": losses.l1,
    "l1_by_norm": lambda step: losses.l1(step, by_decoder_norm=True),
    "gate_sum": losses.gate_sum,
    "gated_aux": losses.gated_aux,
    "matryoshka": losses.matryoshka,
    "auxk": losses.AuxK(),
    "decorrelation": losses.Decorrelation(latents=8),
}
EVERYWHERE = ("mse", "l1", "l1_by_norm", "auxk", "decorrelation")
BUILD: dict[str, tuple[Callable[[], SparseAutoencoder], tuple[str, ...]]] = {
    "standard dense": (lambda: _path(Standard(D, F, decoder_norm="free"), 1.0), EVERYWHERE),
    "standard sparse": (lambda: _path(Standard(D, F, decoder_norm="free"), 0.0), EVERYWHERE),
    "clipped dense": (lambda: _path(Clipped(D, F, cap=0.8, decoder_norm="free"), 1.0), EVERYWHERE),
    "clipped sparse": (lambda: _path(Clipped(D, F, cap=0.8, decoder_norm="free"), 0.0), EVERYWHERE),
    "topk": (lambda: TopK(D, F, k=4, decoder_norm="free"), EVERYWHERE),
    "topk whole": (lambda: TopK(D, F, k=F, decoder_norm="free"), EVERYWHERE),
    "batchtopk": (lambda: BatchTopK(D, F, k=4, decoder_norm="free"), EVERYWHERE),
    "matryoshka": (lambda: Matryoshka(D, F, k=4, decoder_norm="free"), (*EVERYWHERE, "matryoshka")),
    "jumprelu": (lambda: JumpReLU(D, F, threshold=0.3, bandwidth=0.4, decoder_norm="free"), (*EVERYWHERE, "gate_sum")),
    "gated": (lambda: Gated(D, F, decoder_norm="free"), (*EVERYWHERE, "gate_sum", "gated_aux")),
}
CASES = ("ordinary", "batch of one", "empty rows", "ties", "all dead")


def _path(sae: Standard, density: float) -> Standard:
    """Fix which way the code is made."""
    sae._density, sae.look_every = density, 10**9
    sae._batches = 1
    return sae


def prepared(name: str, case: str) -> tuple[SparseAutoencoder, Tensor]:
    """An SAE with weights that are all different, and a batch for the case."""
    generator = torch.Generator().manual_seed(7)
    sae = BUILD[name][0]().double()
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7
    if isinstance(sae, JumpReLU):
        sae.threshold.data.abs_()
    x = torch.randn(1 if case == "batch of one" else 11, D, generator=generator, dtype=torch.float64)
    bias = sae.b_gate if isinstance(sae, Gated) else sae.b_enc
    if case == "empty rows":
        x[3] = sae.b_dec.detach()
        x[7] = sae.b_dec.detach()
        bias.data -= 0.5
        bias.data.clamp_max_(-0.1)
    if case == "ties":
        x[:] = sae.b_dec.detach()
        bias.data.fill_(0.6)
    if case == "all dead":
        bias.data.fill_(-1e3)
    return sae.train(), x.requires_grad_(True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "loss"), [(n, loss) for n, (_, wanted) in BUILD.items() for loss in wanted])
def test_gradients_equal_the_dense_computation(name: str, loss: str, case: str) -> None:
    sae, x = prepared(name, case)
    dead = torch.zeros(F, dtype=torch.bool)
    dead[::3] = True
    code = sae.encode(x)
    step = Step(x, x, code, sae.decode(code), sae, dead=dead, n_dead=int(dead.sum()))
    reference = dense(sae, x, code)
    reference.frequent = code.fired().topk(8).indices
    torch.testing.assert_close(code.dense(), reference.code, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step.reconstruction, reference.code @ sae.W_dec + sae.b_dec, rtol=1e-12, atol=1e-12)
    ours, theirs = ENGINE[loss](step), dense_loss(loss, sae, x, reference, dead)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    names = ["x", *(n for n, _ in sae.named_parameters())]
    wanted = [x, *sae.parameters()]
    gradients = [
        torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else [None] * len(wanted)
        for value in (ours, theirs)
    ]
    for parameter, a, b in zip(names, *gradients, strict=True):
        a = torch.zeros(()) if a is None else a
        b = torch.zeros(()) if b is None else b
        scale = max(float(b.abs().max()), 1e-4)  # a gradient that is zero but for rounding has no relative error
        difference = float((a - b).abs().max()) / scale
        assert difference < 1e-9, f"d {loss} / d {parameter}: relative difference {difference:.1e}"


def test_the_reference_can_tell_a_wrong_gradient() -> None:
    """The comparison above fails if the engine loses part of jumprelu's window."""
    sae, x = prepared("jumprelu", "ordinary")
    code = sae.encode(x)
    reference = dense(sae, x, code)
    (right,) = torch.autograd.grad(reference.code.sum(), sae.threshold, retain_graph=True)
    sae.bandwidth = 0.05
    (wrong,) = torch.autograd.grad(sae.encode(x).sum().sum(), sae.threshold)
    assert (right - wrong).abs().max() > 1e-3
