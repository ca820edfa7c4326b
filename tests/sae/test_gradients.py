"""For every architecture and every core loss, the engine's gradients are those of a dense computation written here.

The reference never compresses anything: it works on [batch, d_sae] with autograd, and is told only which entries the
engine chose where the choice is the engine's (top-k breaks ties arbitrarily). Transcoders rebuild a target of another width,
with a linear path beside the latents or without.
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
from saekit.builtin.architectures.batchtopk import BatchTopK
from saekit.builtin.architectures.clipped import Clipped
from saekit.builtin.architectures.gated import Gated
from saekit.builtin.architectures.jumprelu import JumpReLU
from saekit.builtin.architectures.matryoshka import Matryoshka
from saekit.builtin.architectures.standard import Standard
from saekit.builtin.architectures.topk import TopK

D, F, D_OUT = 5, 24, 7


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
    product = (x if sae.transcoder else x - sae.b_dec) @ sae.W_enc
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


def dense_skip(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """The linear path: sum over i of W_skip[o, i] x[n, i]."""
    if sae.W_skip is None:
        return torch.zeros(len(x), sae.d_out, dtype=torch.float64)
    return (sae.W_skip[None] * x[:, None, :]).sum(2)


def dense_loss(name: str, sae: SparseAutoencoder, x: Tensor, target: Tensor, ref: Dense, dead: Tensor) -> Tensor:
    """Each core loss from its formula."""
    skip = dense_skip(sae, x)
    recon = ref.code @ sae.W_dec + sae.b_dec + skip
    if name == "mse":
        return ((target - recon) ** 2).sum() / target.numel()
    if name == "l1":
        return ref.code.sum() / len(x)  # never negative
    if name == "l1_by_norm":
        return (ref.code * sae.W_dec.norm(dim=1)).sum() / len(x)
    if name == "gate_sum":
        return ref.gates.sum() / len(x)
    if name == "gated_aux":
        rebuilt = ref.gates @ sae.W_dec.detach() + sae.b_dec.detach() + skip.detach()
        return ((target - rebuilt) ** 2).sum() / target.numel()
    if name == "matryoshka":
        total = 0.0
        for size in sae.prefixes:
            total = total + ((target - ref.code[:, :size] @ sae.W_dec[:size] - sae.b_dec - skip) ** 2).mean()
        return total / len(sae.prefixes)
    if name == "auxk":
        residual = (target - recon).detach()
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


def l1_by_norm(step: Step) -> Tensor:
    """The l1 loss where decoder rows have norms of their own; of unit rows it knows that the norms say nothing."""
    step.sae.decoder_norm = "free"
    return losses.l1(step)


ENGINE: dict[str, Callable[[Step], Tensor]] = {
    "mse": losses.mse,
    "l1": lambda step: losses.l1(step, by_decoder_norm=False),
    "l1_by_norm": l1_by_norm,
    "gate_sum": losses.gate_sum,
    "gated_aux": losses.gated_aux,
    "matryoshka": losses.matryoshka,
    "auxk": losses.AuxK(),
    "decorrelation": losses.Decorrelation(latents=8),
}
EVERYWHERE = ("mse", "l1", "l1_by_norm", "auxk", "decorrelation")
SKIP: dict[str, Any] = {"decoder_norm": "free", "skip": True}
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
    "topk transcoder": (lambda: TopK(D, F, D_OUT, k=4, decoder_norm="free"), EVERYWHERE),
    "standard dense skip": (lambda: _path(Standard(D, F, D_OUT, **SKIP), 1.0), EVERYWHERE),
    "standard sparse skip": (lambda: _path(Standard(D, F, D_OUT, **SKIP), 0.0), EVERYWHERE),
    "clipped sparse skip": (lambda: _path(Clipped(D, F, D_OUT, cap=0.8, **SKIP), 0.0), EVERYWHERE),
    "topk skip": (lambda: TopK(D, F, D_OUT, k=4, **SKIP), EVERYWHERE),
    "topk skip same width": (lambda: TopK(D, F, D, k=4, **SKIP), EVERYWHERE),
    "batchtopk skip": (lambda: BatchTopK(D, F, D_OUT, k=4, **SKIP), EVERYWHERE),
    "matryoshka skip": (lambda: Matryoshka(D, F, D_OUT, k=4, **SKIP), (*EVERYWHERE, "matryoshka")),
    "jumprelu skip": (
        lambda: JumpReLU(D, F, D_OUT, threshold=0.3, bandwidth=0.4, **SKIP),
        (*EVERYWHERE, "gate_sum"),
    ),
    "gated skip": (lambda: Gated(D, F, D_OUT, **SKIP), (*EVERYWHERE, "gate_sum", "gated_aux")),
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
    nothing = torch.zeros(D, dtype=torch.float64) if sae.transcoder else sae.b_dec.detach()  # has no pre-activation
    if case == "empty rows":
        x[3] = nothing
        x[7] = nothing
        bias.data -= 0.5
        bias.data.clamp_max_(-0.1)
    if case == "ties":
        x[:] = nothing
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
    target = x
    if sae.transcoder:
        target = torch.randn(len(x), sae.d_out, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    code = sae.encode(x)
    step = Step(x, target, code, sae.reconstruct(x, code), sae, dead=dead, n_dead=int(dead.sum()))
    reference = dense(sae, x, code)
    reference.frequent = code.fired().topk(8).indices
    torch.testing.assert_close(code.dense(), reference.code, rtol=1e-12, atol=1e-12)
    rebuilt = reference.code @ sae.W_dec + sae.b_dec + dense_skip(sae, x)
    torch.testing.assert_close(step.reconstruction, rebuilt, rtol=1e-12, atol=1e-12)
    ours, theirs = ENGINE[loss](step), dense_loss(loss, sae, x, target, reference, dead)
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
