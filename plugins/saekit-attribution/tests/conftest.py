"""Tiny language models as subjects, in float64, with an SAE at the middle layer and samples of several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from interventions.models import D_SAE, D, Plain
from saekit_attribution.labelled_data.teacher_forcing import Sample
from torch import Tensor, nn

from saekit import SparseAutoencoder
from saekit.activations.batch import TokenBatch
from saekit.activations.sites import resolve
from saekit.activations.subject import Subject
from saekit.builtin.architectures.standard import Standard
from saekit.builtin.architectures.topk import TopK
from saekit.testing.tiny import in_float64, tiny_network

VOCABULARY = 120
MODELS = ["gpt2", "llama", "gemma2", "plain"]


def make_model(kind: str) -> nn.Module:
    """A random model of three blocks, the same each time; Gemma-2 has a sliding window of 8 and both soft caps."""
    if kind == "plain":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Plain(VOCABULARY).eval().double()
    caps = {"sliding_window": 8, "final_logit_softcapping": 3.0} if kind == "gemma2" else {}
    return in_float64(tiny_network(kind, VOCABULARY, pad_token_id=1, initializer_range=0.2, **caps).eval())


def make_subject(model: nn.Module, hook_point: str) -> Subject:
    return Subject(model, SimpleNamespace(bos_token_id=0), resolve(model, hook_point), name="tiny")


def make_samples(lengths: Sequence[int], seed: int = 0) -> list[Sample]:
    """Texts with two tokens inserted before the last three; position 0 is the beginning-of-text token."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        drawn = torch.randint(2, VOCABULARY, (length + 1,), generator=generator).tolist()
        tokens, target, base = (0, *drawn[: length - 1]), *drawn[-2:]
        base += target == base
        cut = length - 5
        aligned = (*range(cut), -1, -1, *range(cut, length - 2))
        samples.append(Sample(tokens, target, base, tokens[:cut] + tokens[cut + 2 :], aligned, place=(len(samples), 1)))
    return samples


def make_sae(subject: Subject, kind: str = "topk") -> SparseAutoencoder:
    """An untrained SAE, with rows of different norms, in the model's dtype."""
    tokens = torch.randint(2, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(5))
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    sample = subject.activations(TokenBatch(tokens, everywhere, everywhere, torch.arange(8))).reshape(-1, D)
    generator = torch.Generator().manual_seed(1)
    sae = {"topk": lambda: TopK(D, D_SAE, k=6), "standard": lambda: Standard(D, D_SAE)}[kind]()
    sae.initialise(generator, sample.float())
    with torch.no_grad():
        sae.W_enc.div_(sae.W_enc.norm(dim=0, keepdim=True))
        sae.W_dec.mul_(torch.rand(D_SAE, 1, generator=generator) + 0.5)
        sae.b_enc.copy_(torch.randn(D_SAE, generator=generator) * sample.float().std() * 0.3)
    return sae.to(sample.dtype).eval()


@pytest.fixture(params=MODELS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return make_subject(make_model(request.param), "layers.1" if request.param == "plain" else "blocks.1.hook_out")


@pytest.fixture
def gpt2() -> Subject:
    return make_subject(make_model("gpt2"), "blocks.1.hook_out")


@pytest.fixture
def sae(subject: Subject) -> SparseAutoencoder:
    return make_sae(subject)


def last_logits(subject: Subject, sample: Sample) -> Tensor:
    """The model's own logits [vocabulary] after the last token of a sample."""
    output = subject.model(torch.tensor([sample.tokens]))
    return (output if isinstance(output, Tensor) else output.logits)[0, -1]


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The makers above, which a test module cannot import from here."""
    return SimpleNamespace(
        model=make_model, subject=make_subject, samples=make_samples, sae=make_sae, last_logits=last_logits, d=D
    )
