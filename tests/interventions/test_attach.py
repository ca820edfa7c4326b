"""What passes on is what the mode and the edits say, computed densely by hand; and nothing is left behind."""

from __future__ import annotations

import warnings

import pytest
import torch
from interventions.models import D_SAE, SAES, TOKENS, Case, D, Plain, make_sae
from torch import Tensor, nn

import saekit
from saekit import Mode, SparseAutoencoder, UsageError
from saekit.activations.sites import resolve
from saekit.builtin.architectures.batchtopk import BatchTopK
from saekit.builtin.architectures.topk import TopK
from saekit.testing.tiny import in_float64

EDITS = {
    "add": (saekit.add(1.5), lambda v: v + 1.5),
    "add_less": (saekit.add(-0.7), lambda v: v - 0.7),
    "set_to": (saekit.set_to(0.4), lambda v: torch.full_like(v, 0.4)),
    "scale": (saekit.scale(3.0), lambda v: v * 3.0),
    "ablate": (saekit.ablate(), torch.zeros_like),
    "clamp": (saekit.clamp(0.1, 0.3), lambda v: v.clamp(0.1, 0.3)),
    "clamp_low": (saekit.clamp(low=0.2), lambda v: v.clamp(min=0.2)),
    "clamp_high": (saekit.clamp(high=0.01), lambda v: v.clamp(max=0.01)),
    "function": (lambda v: v.sin() + 1, lambda v: v.sin() + 1),
}


def dense(sae: SparseAutoencoder, x: Tensor, latents: list[int], rule, keep_error: bool) -> Tensor:
    """The edit written out: decode(edited code), plus what the SAE does not rebuild."""
    rows = x.reshape(-1, D)
    code = sae.encode(rows).dense()
    edited = code.clone()
    edited[:, latents] = rule(code[:, latents])
    new = edited @ sae.W_dec + sae.b_dec
    if keep_error:
        new = new + rows - (code @ sae.W_dec + sae.b_dec)
    return new.view(x.shape)


def spliced(case: Case, function) -> Tensor:
    with resolve(case.model, case.middle).replaced(function):
        return case.logits()


def test_bypass_is_bit_identical_and_reads_codes(case: Case, sae: SparseAutoencoder) -> None:
    plain, x = case.logits(), case.activation(case.middle)
    with saekit.attach(case.model, sae, case.middle, record=True) as attached:
        assert torch.equal(case.logits(), plain)
    assert attached.mode is Mode.BYPASS
    assert torch.equal(attached.code.dense(), sae.encode(x.reshape(-1, D)).dense())


def test_an_empty_edit_changes_nothing(case: Case, sae: SparseAutoencoder) -> None:
    plain = case.logits()
    for edits in ({}, {3: saekit.scale(1.0), 4: saekit.add(0.0), 5: saekit.clamp(low=-1e9)}):
        with saekit.attach(case.model, sae, case.middle, edits=edits):
            changed = case.logits()
        torch.testing.assert_close(changed, plain, rtol=0, atol=1e-6)
        assert torch.equal(changed, plain)


def test_no_change_is_the_spliced_reconstruction(case: Case, sae: SparseAutoencoder) -> None:
    def reconstruction(x: Tensor) -> Tensor:
        return dense(sae, x, [], torch.zeros_like, keep_error=False)

    expected = spliced(case, reconstruction)
    assert not torch.allclose(expected, case.logits(), atol=1e-4), "the SAE rebuilds too well for this test to fail"
    with saekit.attach(case.model, sae, case.middle, mode="no_change"):
        torch.testing.assert_close(case.logits(), expected, rtol=1e-4, atol=1e-5)
    with saekit.attach(case.model, sae, case.middle, edits={}, keep_error=False):
        torch.testing.assert_close(case.logits(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("name", EDITS)
def test_each_edit_is_the_dense_computation(case: Case, sae: SparseAutoencoder, name: str, keep_error: bool) -> None:
    edit, rule = EDITS[name]
    latents = sae.encode(case.activation(case.middle).reshape(-1, D)).dense().sum(0).topk(3).indices.tolist()
    expected = spliced(case, lambda x: dense(sae, x, latents, rule, keep_error))
    assert (expected - case.logits()).abs().max() > 1e-3
    with saekit.attach(case.model, sae, case.middle, edits=dict.fromkeys(latents, edit), keep_error=keep_error):
        torch.testing.assert_close(case.logits(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep_error", [True, False])
def test_an_architecture_with_its_own_decoder(gpt2: Case, keep_error: bool) -> None:
    sae = make_sae("other_decoder", gpt2.activation(gpt2.middle))

    def by_hand(x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        code = sae.encode(rows).dense()
        edited = code.clone()
        edited[:, 3] += 2
        old, new = (torch.tanh(c @ sae.W_dec + sae.b_dec) * 2 for c in (code, edited))
        return (new + (rows - old if keep_error else 0)).view(x.shape)

    with saekit.attach(gpt2.model, sae, gpt2.middle, edits={3: saekit.add(2)}, keep_error=keep_error):
        ours = gpt2.logits()
    torch.testing.assert_close(ours, spliced(gpt2, by_hand), rtol=1e-4, atol=1e-5)


def test_different_edits_of_different_latents(case: Case, sae: SparseAutoencoder) -> None:
    edits = {latent: edit for latent, (edit, _) in zip(range(2, 40, 4), EDITS.values(), strict=False)}
    rules = dict(zip(edits, (rule for _, rule in EDITS.values()), strict=True))

    def rule(values: Tensor) -> Tensor:
        return torch.stack([rules[latent](values[:, i]) for i, latent in enumerate(edits)], 1)

    with saekit.attach(case.model, sae, case.middle, edits=edits):
        ours = case.logits()
    expected = spliced(case, lambda x: dense(sae, x, list(edits), rule, True))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_tensor_gives_every_position_its_own_strength(case: Case, sae: SparseAutoencoder) -> None:
    strength = torch.randn(TOKENS.shape, generator=torch.Generator().manual_seed(3))
    for given, whole in ((strength, strength), (strength[:, :1], strength[:, :1].expand(TOKENS.shape))):
        expected = spliced(case, lambda x, w=whole: dense(sae, x, [5], lambda _: w.reshape(-1, 1), True))
        with saekit.attach(case.model, sae, case.middle, edits={5: saekit.set_to(given)}):
            torch.testing.assert_close(case.logits(), expected, rtol=1e-4, atol=1e-5)
    with (
        pytest.raises(UsageError, match=r"strength of shape \[3, 12\] does not fit a forward of \[2, 12\]"),
        saekit.attach(case.model, sae, case.middle, edits={5: saekit.add(torch.ones(3, 12))}),
    ):
        case.logits()


def test_hooks_are_gone_whatever_happens(case: Case, sae: SparseAutoencoder) -> None:
    before, plain = case.hooks(), case.logits()

    def fail(values: Tensor) -> Tensor:
        raise ZeroDivisionError("inside the edit")

    with pytest.raises(ZeroDivisionError), saekit.attach(case.model, sae, case.middle, edits={1: fail}):
        case.logits()
    attached = saekit.attach(case.model, sae, case.middle, edits={1: saekit.add(1)}, record=True, reads=[case.above])
    with attached:
        assert case.hooks() > before
        case.logits()
    with pytest.raises(KeyError), attached:
        raise KeyError("in the block")
    wrong = saekit.attach(case.model, sae, case.middle, edits={1: saekit.add(1)}, positions=[0])
    wrong._reads = [None]  # entering fails half-way
    with pytest.raises(AttributeError), wrong:
        pass
    assert not wrong.active
    assert case.hooks() == before
    assert torch.equal(case.logits(), plain)


def test_an_edit_that_fails_leaves_the_sae_in_its_mode(gpt2: Case) -> None:
    sae = BatchTopK(D, D_SAE, k=4)
    sae.initialise(torch.Generator().manual_seed(0), gpt2.activation(gpt2.middle).reshape(-1, D))
    assert sae.training
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with saekit.attach(gpt2.model, sae, gpt2.middle, edits={1: saekit.add(1.0)}):
        gpt2.logits()
    with pytest.raises(ZeroDivisionError), saekit.attach(gpt2.model, sae, gpt2.middle, edits={1: lambda v: 1 / 0}):
        gpt2.logits()
    assert sae.training
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())  # the threshold too


def test_weights_gradients_and_random_numbers_are_left_alone(case: Case, sae: SparseAutoencoder) -> None:
    weights = {name: value.clone() for name, value in case.model.state_dict().items()}
    state = torch.get_rng_state()
    with saekit.attach(case.model, sae, case.middle, edits={1: saekit.add(1.0)}, record=True):
        case.logits()
    saekit.ensure_downstream(case.model, case.below, case.above, TOKENS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in case.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in case.model.parameters())


def test_edits_at_two_sites_compose_and_a_read_above_sees_the_edit_below(case: Case) -> None:
    low, high = (make_sae("topk", case.activation(at), seed) for at, seed in ((case.below, 1), (case.above, 2)))
    alone = case.logits()
    first = saekit.attach(case.model, low, case.below, edits={2: saekit.add(1.0)})
    second = saekit.attach(case.model, high, case.above, edits={9: saekit.set_to(2.0)})
    with saekit.attach_all([first, second]) as both:
        assert both == [first, second]
        ours = case.logits()

    below, above = resolve(case.model, case.below), resolve(case.model, case.above)
    with (
        below.replaced(lambda x: dense(low, x, [2], lambda v: v + 1, True)),
        above.replaced(lambda x: dense(high, x, [9], lambda v: torch.full_like(v, 2.0), True)),
    ):
        expected = case.logits()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, alone)

    with first, above.capture() as seen, saekit.read(case.model, high, case.above, after=first) as reader:
        case.logits()
    assert torch.equal(reader.code.dense(), high.encode(seen.value.reshape(-1, D)).dense())
    assert not torch.equal(reader.code.dense(), high.encode(case.activation(case.above).reshape(-1, D)).dense())


def test_at_one_site_the_later_sae_sees_what_the_earlier_passes_on(case: Case) -> None:
    x = case.activation(case.middle)
    one, two = make_sae("topk", x, 1), make_sae("standard", x, 2)
    with (
        saekit.attach(case.model, one, case.middle, edits={2: saekit.add(1.0)}),
        saekit.attach(case.model, two, case.middle, edits={4: saekit.ablate(), 5: saekit.add(-2.0)}),
    ):
        ours = case.logits()

    def in_order(x: Tensor) -> Tensor:
        x = dense(one, x, [2], lambda v: v + 1, True)
        x = dense(two, x, [4], torch.zeros_like, True)
        return x - 2.0 * two.W_dec[5]

    torch.testing.assert_close(ours, spliced(case, in_order), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SAES)
@pytest.mark.parametrize("keep_error", [True, False])
def test_the_gradient_is_that_of_the_dense_computation(case: Case, kind: str, keep_error: bool) -> None:
    in_float64(case.model)
    sae = make_sae(kind, case.activation(case.middle))
    probe = torch.zeros(*TOKENS.shape, D, dtype=torch.float64, requires_grad=True)
    strength = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    below = resolve(case.model, case.below)
    weights = torch.randn(320, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradients(wanted: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad((case.logits() @ weights).square().sum(), wanted)

    def by_hand(x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        code = sae.encode(rows).dense()
        columns = list(code.unbind(1))
        columns[3], columns[7], columns[20] = columns[3] + strength, columns[7] * 2, columns[20].clamp(0.05, 0.4)
        new, old = (sae.decode(saekit.DenseCode(c)) for c in (torch.stack(columns, 1), code))
        return (new + (rows - old if keep_error else 0)).view(x.shape)

    edits = {3: saekit.add(strength), 7: saekit.scale(2.0), 20: saekit.clamp(0.05, 0.4)}
    with (
        below.replaced(lambda x: x + probe),
        saekit.attach(case.model, sae, case.middle, edits=edits, keep_error=keep_error),
    ):
        ours = gradients([probe, strength])
    with below.replaced(lambda x: x + probe), resolve(case.model, case.middle).replaced(by_hand):
        expected = gradients([probe, strength])
    assert all(bool(g.abs().max() > 0) for g in expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    with below.replaced(lambda x: x + probe), saekit.attach(case.model, sae, case.middle, mode="no_change"):
        ours = gradients([probe])

    def rebuilt(x: Tensor) -> Tensor:
        return sae.decode(saekit.DenseCode(sae.encode(x.reshape(-1, D)).dense())).view(x.shape)

    with below.replaced(lambda x: x + probe), resolve(case.model, case.middle).replaced(rebuilt):
        expected = gradients([probe])
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-9, atol=1e-12)


def test_a_gradient_reaches_the_recorded_code(gpt2: Case) -> None:
    sae = make_sae("topk", gpt2.activation(gpt2.middle)).requires_grad_(True)
    with saekit.attach(gpt2.model, sae, gpt2.middle, mode="no_change", record=True) as attached:
        (gradient,) = torch.autograd.grad(gpt2.logits().square().sum(), attached.code.values)
    assert gradient.abs().min() > 0


def test_the_sae_computes_in_its_own_dtype(gpt2: Case) -> None:
    plain = gpt2.logits()
    sae = make_sae("topk", gpt2.activation(gpt2.middle))
    gpt2.model.to(torch.float16)
    seen: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    half = gpt2.logits()
    with saekit.attach(gpt2.model, sae, gpt2.middle, edits={1: saekit.scale(1.0)}, record=True) as attached:
        assert torch.equal(gpt2.logits(), half)
    assert attached.code.dense().dtype == torch.float32
    with (
        resolve(gpt2.model, gpt2.middle).replaced(note),
        saekit.attach(gpt2.model, sae, gpt2.middle, edits={1: saekit.add(1.0)}),
        resolve(gpt2.model, gpt2.middle).replaced(note),
    ):
        gpt2.logits()
    expected = (seen[0].float() + 1.0 * sae.W_dec[1]).half()
    assert seen[1].dtype == torch.float16
    assert torch.equal(seen[1], expected)
    gpt2.model.float()
    with torch.autocast("cpu", torch.bfloat16), saekit.attach(gpt2.model, sae, gpt2.middle, record=True) as attached:
        gpt2.logits()
    assert attached.code.dense().dtype == torch.float32
    assert torch.isfinite(plain).all()


def test_recording_changes_nothing_of_what_passes_on(case: Case, sae: SparseAutoencoder) -> None:
    settings = {"edits": {1: saekit.add(1.0), 2: saekit.scale(2.0)}, "positions": [2, 5]}
    with saekit.attach(case.model, sae, case.middle, **settings):
        silent = case.logits()
    with saekit.attach(case.model, sae, case.middle, **settings, record=True) as attached:
        assert torch.equal(case.logits(), silent)
    assert len(attached.code) == TOKENS.numel()
    with saekit.attach(case.model, sae, case.middle, edits={1: saekit.add(1.0)}) as attached:
        case.logits()
    with pytest.raises(UsageError, match="Attach with record=True"):
        _ = attached.code
    assert attached.codes == []


def test_an_activation_without_positions(gpt2: Case) -> None:
    """[n, d]: a module that sees single rows."""
    model = nn.Sequential(nn.Linear(8, D), nn.ReLU(), nn.Linear(D, 4)).requires_grad_(False)
    x = torch.randn(5, 8)
    sae = make_sae("topk", model[0](x))
    with saekit.attach(model, sae, "0", edits={3: saekit.add(1.0)}):
        ours = model(x)
    torch.testing.assert_close(ours, model[2](model[1](model[0](x) + sae.W_dec[3])), rtol=1e-5, atol=1e-6)
    with (
        pytest.raises(UsageError, match=r"is \[5, 32\], which has no positions"),
        saekit.attach(model, sae, "0", edits={3: saekit.add(1.0)}, positions=[0]),
    ):
        model(x)
    flat = nn.Sequential(nn.Linear(8, D), nn.Unflatten(1, (1, 1, D)))
    with pytest.raises(UsageError, match=r"is \[5, 1, 1, 32\]; it must be"), saekit.attach(flat, sae, "1", edits={}):
        flat(x)


def test_an_attachment_that_changed_nothing_says_so(gpt2: Case) -> None:
    sae = make_sae("topk", gpt2.activation(gpt2.middle))
    with (
        pytest.warns(UserWarning, match="no forward of the model reached it"),
        saekit.attach(gpt2.model, sae, gpt2.middle, mode="no_change"),
    ):
        pass
    with (
        pytest.warns(UserWarning, match="its positions chose none"),
        saekit.attach(gpt2.model, sae, gpt2.middle, edits={1: saekit.add(1)}, positions=[40]),
    ):
        gpt2.logits()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with saekit.attach(gpt2.model, sae, gpt2.middle):
            pass
        with pytest.raises(KeyError), saekit.attach(gpt2.model, sae, gpt2.middle, edits={1: saekit.add(1)}):
            raise KeyError


def test_an_attachment_is_used_again_but_not_twice_at_once(gpt2: Case) -> None:
    sae = make_sae("topk", gpt2.activation(gpt2.middle))
    attached = saekit.attach(gpt2.model, sae, gpt2.middle, edits={1: saekit.add(1)}, record=True)
    results = []
    for _ in range(2):
        with attached:
            results.append(gpt2.logits())
            assert (attached.visits, attached.changed, len(attached.codes)) == (1, TOKENS.numel(), 1)
    assert torch.equal(*results)
    with attached:
        with pytest.raises(UsageError, match="is attached already"), attached:
            pass
        gpt2.logits()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edits": {D_SAE: saekit.ablate()}}, r"no latent 48; the SAE has 48, 0 to 47"),
        ({"edits": {-1: saekit.ablate()}}, r"no latent -1"),
        ({"edits": {"3": saekit.ablate()}}, r"'3' is not a latent"),
        ({"edits": {3: 1.0}}, r"edit of latent 3: 1.0 is not an edit"),
        ({"edits": [saekit.ablate()]}, r"must be \{latent: edit\}, not list"),
        ({"edits": {3: saekit.ablate()}, "mode": "bypass"}, "mode 'bypass' edits nothing"),
        ({"edits": {3: saekit.ablate()}, "mode": Mode.NO_CHANGE}, "mode 'no_change' edits nothing"),
        ({"mode": "edit"}, "mode 'edit' needs edits"),
        ({"mode": "splice"}, r"no mode 'splice'. Choose 'bypass', 'no_change', 'edit'"),
        ({"positions": [1]}, "positions is for changes"),
        ({"keep_error": False}, "keep_error=False is for changes"),
        ({"edits": {3: saekit.add(1, unit="max")}}, r"units of the latent's max, which statistics does not have"),
        ({"edits": {3: saekit.add(1, unit="rms")}, "statistics": {"max": torch.ones(D_SAE)}}, "latent's rms, which"),
        ({"edits": {3: saekit.add(1, unit="max")}, "statistics": {"max": {4: 1.0}}}, "which statistics does not have"),
        (
            {"edits": {3: saekit.add(1, unit="max")}, "statistics": {"max": torch.ones(7)}},
            r"has shape \[7\]. It must be",
        ),
        ({"edits": {3: saekit.add(1, unit="max")}, "statistics": {"max": torch.zeros(D_SAE)}}, "never fires"),
        ({"edits": {3: saekit.add(1, unit="max")}, "statistics": {"max": {3: float("nan")}}}, "which is nan"),
        ({"edits": {}, "positions": slice(0, 9, -1)}, "step of a slice must be 1 or more"),
        ({"edits": {}, "positions": [1.5]}, "neither a slice, a list of numbers"),
        ({"edits": {}, "positions": "all"}, "neither a slice, a list of numbers"),
        ({"edits": {}, "positions": torch.ones(12, dtype=torch.bool)}, r"a mask must be \[n, T\]"),
        ({"at": "blocks.1.hook_outt"}, "Did you mean 'blocks.1.hook_out'"),
        ({"at": "blocks.9.hook_out"}, "no block 9; the model has 3"),
        ({"edits": {}, "reads": ["blocks.0.hook_ot"]}, "Did you mean 'blocks.0.hook_out'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(gpt2: Case, settings: dict, message: str) -> None:
    sae = make_sae("topk", torch.randn(2, 3, D))
    with pytest.raises(UsageError, match=message):
        saekit.attach(gpt2.model, sae, **{"at": gpt2.middle, **settings})


def test_what_is_no_model_or_no_sae_or_does_not_fit(gpt2: Case) -> None:
    sae = TopK(16, D_SAE, k=4).eval()
    with pytest.raises(UsageError, match="the model must be a torch.nn.Module, not str"):
        saekit.attach("gpt2", sae, gpt2.middle)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"must be a saekit.SparseAutoencoder, not Linear. saekit.load_sae"):
        saekit.attach(gpt2.model, nn.Linear(2, 2), gpt2.middle)  # type: ignore[arg-type]
    with (
        pytest.raises(UsageError, match=r"is 32 wide and the SAE reads 16"),
        saekit.attach(gpt2.model, sae, gpt2.middle),
    ):
        gpt2.logits()
    transcoder = TopK(D, D_SAE, 16, k=4)
    with pytest.raises(UsageError, match="reads 32 dimensions and writes 16"):
        saekit.attach(gpt2.model, transcoder, gpt2.middle, mode="no_change")
    transcoder.initialise(torch.Generator().manual_seed(0), torch.randn(4, 16))
    plain = gpt2.logits()
    with saekit.read(gpt2.model, transcoder, gpt2.middle) as reader:
        assert torch.equal(gpt2.logits(), plain)
    assert len(reader.code) == TOKENS.numel()
    with (
        pytest.raises(UsageError, match="on cpu and the SAE on meta"),
        saekit.attach(gpt2.model, TopK(D, D_SAE, k=4).to("meta"), gpt2.middle),
    ):
        gpt2.logits()


def test_an_item_of_a_tuple_is_a_site_like_any_other(gpt2: Case) -> None:
    at = "transformer.h.1.attn[0]"
    sae = make_sae("topk", gpt2.activation(at))
    with saekit.attach(gpt2.model, sae, at, edits={3: saekit.add(2.0)}):
        ours = gpt2.logits()
    with resolve(gpt2.model, at).replaced(lambda x: x + 2.0 * sae.W_dec[3]):
        torch.testing.assert_close(ours, gpt2.logits(), rtol=1e-4, atol=1e-5)


def test_a_model_that_trains_below_gets_its_gradients() -> None:
    """Nothing is frozen or detached: parameters below a NO_CHANGE still learn if they ask to."""
    model = Plain()
    with torch.no_grad():
        sample = model.layers[1](model.layers[0](model.embed(TOKENS)))
    sae = make_sae("standard", sample)
    with saekit.attach(model, sae, "layers.1", mode="no_change"):
        model(TOKENS).square().sum().backward()
    assert model.embed.weight.grad is not None and model.embed.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in sae.parameters())
