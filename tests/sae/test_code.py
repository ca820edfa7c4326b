"""The sparse code and its kernels equal a dense reference written here, in float64, values and gradients alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit import DenseCode, SparseCode
from saekit.builtin.architectures.batchtopk import BatchTopK
from saekit.builtin.architectures.standard import Standard
from saekit.builtin.architectures.topk import TopK
from saekit.sae.kernels import Pattern, decode_sparse, sampled_product, transposed_sum


def ragged(seed: int, batch: int, d_sae: int) -> tuple[Pattern, torch.Tensor]:
    """A random code with rows of any length, empty ones among them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, d_sae, generator=generator) < torch.rand(batch, 1, generator=generator) * 0.6
    mask[0] = False
    offsets = torch.zeros(batch + 1, dtype=torch.long)
    offsets[1:] = mask.sum(1).cumsum(0)
    indices = mask.nonzero()[:, 1]
    values = torch.randn(len(indices), generator=generator, dtype=torch.float64)
    return Pattern(indices, offsets, d_sae), values


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 7), d_sae=st.integers(1, 12))
def test_every_operation_equals_the_dense_code(seed: int, batch: int, d_sae: int) -> None:
    pattern, values = ragged(seed, batch, d_sae)
    values.requires_grad_(True)
    sparse = SparseCode(pattern, values)
    dense = DenseCode(sparse.dense().detach().clone().requires_grad_(True))
    weights = torch.rand(d_sae, dtype=torch.float64)
    latents = torch.randint(0, d_sae, (4,))
    for operation in (
        lambda c: c.sum(),
        lambda c: c.square_sum(),
        lambda c: c.weighted_sum(weights),
        lambda c: c.column(d_sae - 1),
        lambda c: c.columns(latents),
        lambda c: c.dense(),
    ):
        ours, theirs = operation(sparse), operation(dense)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        probe = torch.randn_like(theirs)
        (d_sparse,) = torch.autograd.grad((ours * probe).sum(), values, retain_graph=True)
        (d_dense,) = torch.autograd.grad((theirs * probe).sum(), dense.activations)
        torch.testing.assert_close(d_sparse, d_dense[pattern.rows, pattern.indices], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sparse.count(), dense.count())
    torch.testing.assert_close(sparse.fired(), dense.fired())
    for ours, theirs in zip(sparse.nonzero(), dense.nonzero(), strict=True):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 7), d_sae=st.integers(1, 12))
def test_decode_and_its_gradients_equal_the_dense_product(seed: int, batch: int, d_sae: int) -> None:
    pattern, values = ragged(seed, batch, d_sae)
    W = torch.randn(d_sae, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True)
    values.requires_grad_(True)
    out = decode_sparse(values, W, b, pattern)
    reference = SparseCode(pattern, values).dense() @ W + b
    torch.testing.assert_close(out, reference, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(out)
    ours = torch.autograd.grad((out * probe).sum(), (values, W, b))
    theirs = torch.autograd.grad((reference * probe).sum(), (values, W, b))
    for a, c in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


def test_the_two_ways_to_a_sampled_product_agree() -> None:
    pattern, _ = ragged(3, 6, 9)
    left, right = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    expected = (left @ right.T)[pattern.rows, pattern.indices]
    torch.testing.assert_close(sampled_product(pattern, left, right), expected)
    gathered = sampled_product(pattern, left.to(torch.bfloat16), right.to(torch.bfloat16))
    torch.testing.assert_close(gathered.double(), expected, rtol=0.05, atol=0.05)


def test_a_transposed_sum_of_nothing_is_zero() -> None:
    pattern = Pattern(torch.empty(0, dtype=torch.long), torch.zeros(4, dtype=torch.long), 5)
    assert transposed_sum(torch.empty(0), pattern, torch.randn(3, 2)).eq(0).all()


def dense_topk(sae: TopK, x: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TopK written densely, on the latents that the sparse one chose."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    mask = torch.zeros_like(pre).scatter_(1, latents, 1.0)
    code = pre.relu() * mask
    return code, code @ sae.W_dec + sae.b_dec


@pytest.mark.parametrize("k", [1, 4, 24])
@pytest.mark.parametrize("batch", [1, 9])
def test_topk_has_the_gradients_of_the_dense_computation(k: int, batch: int) -> None:
    torch.manual_seed(0)
    sae = TopK(6, 24, k=k).double()
    sae.initialise(torch.Generator().manual_seed(1), torch.randn(20, 6).double())
    sae.b_enc.data.normal_()
    x = torch.randn(batch, 6, dtype=torch.float64, requires_grad=True)
    code = sae.encode(x)
    out = sae.decode(code)
    reference_code, reference = dense_topk(sae, x, code.pattern.indices.view(batch, k))
    torch.testing.assert_close(code.dense(), reference_code, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, reference, rtol=1e-12, atol=1e-12)
    wanted = (x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    ours = torch.autograd.grad(out.square().sum() + code.sum().sum(), wanted)
    theirs = torch.autograd.grad(reference.square().sum() + reference_code.sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("architecture", [Standard, TopK])
def test_pre_activations_of_some_latents_are_those_of_all(architecture: type) -> None:
    sae = architecture(6, 40).double()
    sae.initialise(torch.Generator().manual_seed(1), torch.randn(20, 6).double())
    x = torch.randn(3, 6, dtype=torch.float64)
    code = sae.encode(x)
    some = torch.tensor([5, 0, 39])
    torch.testing.assert_close(code.pre(some), code.pre()[:, some])
    (gradient,) = torch.autograd.grad(code.pre(some).sum(), sae.W_enc)
    assert gradient[:, some].abs().sum() > 0
    assert gradient.abs().sum(0).count_nonzero() == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "architecture", ["standard", "clipped", "topk", "batchtopk", "matryoshka", "jumprelu", "gated"]
)
def test_a_positive_margin_fires_and_a_negative_one_does_not(random_sae, inputs, architecture: str, training: bool) -> None:
    """Every bias and threshold is drawn, so each latent has its own."""
    sae = random_sae(architecture).double().train(training)
    code = sae.encode(inputs.double())
    margin, fires = code.margin(), code.dense() != 0
    assert bool(fires[margin > 1e-9].all()) and not bool(fires[margin < -1e-9].any())
    assert bool((margin > 1e-9).any()) and bool((margin < -1e-9).any())
    some = torch.tensor([5, 0, 39])
    torch.testing.assert_close(code.margin(some), margin[:, some])
    torch.testing.assert_close(code.pre(some) - code.margin(some), (code.pre() - margin)[:, some])


def test_the_margin_of_topk_is_the_distance_to_the_smallest_activation_of_the_row() -> None:
    sae = TopK(6, 40, k=4)
    sae.initialise(torch.Generator().manual_seed(1), torch.randn(20, 6))
    code = sae.encode(torch.randn(9, 6))
    some = torch.tensor([5, 0, 39])
    smallest = torch.where(code.dense() > 0, code.dense(), torch.inf).amin(1, keepdim=True)
    assert torch.equal(code.margin(some), code.pre(some) - smallest)
    (gradient,) = torch.autograd.grad(code.margin(some).sum(), sae.W_enc)
    assert gradient.abs().sum(0).nonzero().flatten().tolist() == [0, 5, 39]


def test_a_code_keeps_the_threshold_that_it_was_made_with() -> None:
    """The sequences of a step are encoded in evaluation mode, and asked for their margins in the middle of training."""
    sae = BatchTopK(6, 40, k=4).double()
    sae.initialise(torch.Generator().manual_seed(1), torch.randn(20, 6).double())
    sae.encode(torch.randn(64, 6).double())
    code = sae.eval().encode(torch.randn(9, 6).double())
    before = code.margin().clone()
    sae.train().encode(100 * torch.randn(64, 6).double())
    assert torch.equal(code.margin(), before)


class Sharp(Standard):
    """Says nothing of its threshold, and its activations are not in units of its pre-activations."""

    def gate(self, x):
        return self.dense_code(x, torch.linspace(0.1, 9, self.d_sae).to(x) * self.pre_activations(x).relu())


def test_an_architecture_that_says_nothing_has_margins_from_the_row() -> None:
    sae = Sharp(6, 40).double()
    sae.initialise(torch.Generator().manual_seed(1), torch.randn(20, 6).double())
    x = torch.randn(30, 6).double()
    sae.b_enc.data.normal_()
    code = sae.encode(x)
    margin, fires = code.margin(), code.dense() != 0
    assert torch.equal(margin >= 0, fires) and bool(fires.any())
    sae.b_enc.data.fill_(-100.0)
    assert bool((sae.encode(x).margin() < 0).all())
    with pytest.raises(ValueError, match="not made by an encoder"):
        DenseCode(torch.ones(2, 3)).margin()


@pytest.mark.parametrize("architecture", [Standard, TopK])
def test_rescaling_gives_the_same_reconstruction_of_raw_activations(architecture: type) -> None:
    sae = architecture(6, 40).double()
    sae.initialise(torch.Generator().manual_seed(1), torch.randn(20, 6).double())
    sae.b_enc.data.normal_()
    x = torch.randn(7, 6, dtype=torch.float64)
    scaled = sae(x * 2.5) / 2.5
    sae.rescale(2.5)
    torch.testing.assert_close(sae(x), scaled)


def test_unit_rows_stay_unit_and_their_gradient_is_orthogonal() -> None:
    sae = TopK(6, 40, k=4).double()
    sae.initialise(torch.Generator().manual_seed(1), torch.randn(20, 6).double())
    sae.constrain_weights()
    sae(torch.randn(8, 6).double()).square().sum().backward()
    sae.constrain_gradients()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-12
    sae.W_dec.data.mul_(3.0)
    sae.constrain_weights()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40, dtype=torch.float64))


def test_the_encoder_lies_latent_major_in_memory() -> None:
    assert TopK(6, 40, k=4).W_enc.t().is_contiguous()
