"""The divergences and their gradients against the written-out formulas."""

from __future__ import annotations

import torch
from saekit_unlearning.kl import forget_kl, retain_kl


def logits(seed: int) -> torch.Tensor:
    return (3 * torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).requires_grad_(
        True
    )


def gradients(value: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value.sum(), of))


def test_forget_divergence_is_that_from_uniform_in_value_and_gradient():
    z = logits(0)
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    written = sum(p[:, v] * torch.log(p[:, v] / (1 / 11)) for v in range(11))
    torch.testing.assert_close(forget_kl(z), written)
    torch.testing.assert_close(gradients(forget_kl(z), z), gradients(written, z), rtol=1e-10, atol=1e-12)


def test_forget_divergence_from_an_oracle_in_value_and_gradient():
    z, other = logits(0), logits(1).detach()
    p, q = (x.exp() / x.exp().sum(-1, keepdim=True) for x in (z, other))
    written = sum(p[:, v] * torch.log(p[:, v] / q[:, v]) for v in range(11))
    torch.testing.assert_close(forget_kl(z, other), written)
    torch.testing.assert_close(gradients(forget_kl(z, other), z), gradients(written, z), rtol=1e-10, atol=1e-12)


def test_retain_divergence_is_from_the_base_which_gets_no_gradient():
    base, z = logits(0), logits(1)
    b, p = (x.exp() / x.exp().sum(-1, keepdim=True) for x in (base.detach(), z))
    written = sum(b[:, v] * torch.log(b[:, v] / p[:, v]) for v in range(11))
    torch.testing.assert_close(retain_kl(base, z), written)
    torch.testing.assert_close(gradients(retain_kl(base, z), z), gradients(written, z), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(retain_kl(base, z), z)[0], p.detach() - b, rtol=1e-10, atol=1e-12)
    retain_kl(base, z).sum().backward()
    assert base.grad is None
