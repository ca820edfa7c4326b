"""`ghost` has the gradient of its formula, and builds no matrix of the living latents."""

import pytest
import torch
from saekit_revival.ghost import Ghost

import saekit.testing
from saekit import Code
from saekit.testing import make_step

test_conformance = saekit.testing.conformance("loss", "ghost")


@pytest.mark.parametrize("architecture", ["topk", "standard", "gated", "jumprelu"])
def test_the_gradient_is_that_of_the_formula(architecture: str) -> None:
    step = make_step(architecture=architecture, dead=5, dtype=torch.float64)
    sae, x, dead = step.sae, step.x, step.dead.nonzero().squeeze(1)
    value = Ghost()(step)
    with torch.no_grad():
        r = step.error
        z = (x - sae.b_dec) @ sae.W_enc[:, dead] + (sae.b_gate if architecture == "gated" else sae.b_enc)[dead]
        e = z.exp()  # [batch, n]
        g = e @ sae.W_dec[dead]
        a = r.norm(dim=1, keepdim=True) / (2 * g.norm(dim=1, keepdim=True))
        torch.testing.assert_close((a * g).norm(dim=1), r.norm(dim=1) / 2)
        c = r.square().mean() / (r - a * g).square().mean()
        d_g = c * a * 2 * (a * g - r) / r.numel()  # [batch, d_out]
        d_z = e * (d_g @ sae.W_dec[dead].t())  # [batch, n]
        wanted_dec, wanted_enc = torch.zeros_like(sae.W_dec), torch.zeros_like(sae.W_enc)
        wanted_dec[dead], wanted_enc[:, dead] = e.t() @ d_g, (x - sae.b_dec).t() @ d_z
    assert float(value.detach()) == pytest.approx(float(r.square().mean()), rel=1e-12)
    found = torch.autograd.grad(value, [sae.W_dec, sae.W_enc])
    torch.testing.assert_close(found[0], wanted_dec, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(found[1], wanted_enc, rtol=1e-9, atol=1e-15)
    assert wanted_enc[:, dead].ne(0).any(0).all()


def test_it_asks_for_the_dead_latents_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    pre = Code.pre
    monkeypatch.setattr(Code, "pre", lambda self, latents=None: asked.append(latents) or pre(self, latents))
    monkeypatch.setattr(Code, "dense", lambda self: pytest.fail("it built [batch, d_sae]"))
    step = make_step(dead=3)
    Ghost()(step)
    assert [sorted(latents.tolist()) for latents in asked] == [step.dead.nonzero().squeeze(1).tolist()]


def test_without_dead_latents_it_is_skipped_and_large_pre_activations_do_not_overflow() -> None:
    assert not Ghost().active(make_step())
    step = make_step(dead=4)
    step.sae.b_enc.data[step.dead] = 500.0  # exp(500) is infinite in float64 too
    value = Ghost()(step)
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, [step.sae.W_enc, step.sae.W_dec]))
