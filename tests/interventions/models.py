"""What these tests share. Three tiny language models and a plain module, each with a site in its middle, and SAEs that fit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from saekit import SparseAutoencoder
from saekit.activations.sites import resolve, run_to_site
from saekit.builtin.architectures.standard import Standard
from saekit.builtin.architectures.topk import TopK

D, D_SAE = 32, 48
TOKENS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
LANGUAGE_MODELS = ["tiny_gpt2", "tiny_llama", "tiny_gemma2"]


class Mixing(nn.Module):
    """A residual block that sees the mean of what came before: causal, like attention."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return x + torch.tanh(self.linear(x.cumsum(1) / counts))


class Plain(nn.Module):
    """A model of no known kind, with no list of blocks, no cache, and a head it does not name: [n, T] -> [n, T, vocabulary]."""

    def __init__(self, vocabulary: int = 320) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, D)
        self.layers = nn.Sequential(Mixing(), Mixing(), Mixing())
        self.head = nn.Linear(D, vocabulary)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.layers(self.embed(tokens)))


@dataclass
class Case:
    """A model with three sites in the order of its forward; `middle` is where SAEs are attached."""

    model: nn.Module
    below: str
    middle: str
    above: str

    def logits(self, tokens: Tensor = TOKENS) -> Tensor:
        output: Any = self.model(tokens)
        return output if isinstance(output, Tensor) else output.logits

    def activation(self, at: str, tokens: Tensor = TOKENS) -> Tensor:
        return run_to_site(resolve(self.model, at), lambda: self.model(tokens))

    def hooks(self) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules())


def loaded(directory: Any) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    return model.eval().requires_grad_(False)


@pytest.fixture(params=[*LANGUAGE_MODELS, "plain"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "plain":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Plain().eval().requires_grad_(False)
        return Case(model, "layers.0", "layers.1", "layers.2")
    return language_case(request.getfixturevalue(request.param))


@pytest.fixture(params=LANGUAGE_MODELS)
def language(request: pytest.FixtureRequest) -> Case:
    return language_case(request.getfixturevalue(request.param))


@pytest.fixture
def gpt2(tiny_gpt2: Any) -> Case:
    return language_case(tiny_gpt2)


def language_case(directory: Any) -> Case:
    return Case(loaded(directory), "blocks.0.hook_out", "blocks.1.hook_out", "blocks.2.hook_out")


class StandardSparse(Standard):
    """Always the compressed code."""

    sparse_below = 2.0


class OtherDecoder(TopK):
    """A decoder that is more than a product with W_dec."""

    def decode(self, code: Any) -> Tensor:
        return torch.tanh(super().decode(code)) * 2


SAES: dict[str, Callable[[], SparseAutoencoder]] = {
    "topk": lambda: TopK(D, D_SAE, k=6),
    "standard": lambda: Standard(D, D_SAE),
    "standard_sparse": lambda: StandardSparse(D, D_SAE),
    "other_decoder": lambda: OtherDecoder(D, D_SAE, k=6),
}


def make_sae(kind: str, sample: Tensor, seed: int = 1) -> SparseAutoencoder:
    """An untrained SAE with biases, in the dtype of `sample` [n, T, d]."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAES[kind]()
    sae.initialise(generator, sample.detach().float().reshape(-1, D))
    with torch.no_grad():
        for rows in (sae.W_enc.t(), sae.W_dec):  # as large as a trained SAE's, so that every edit makes a difference
            rows.div_(rows.norm(dim=1, keepdim=True))
        sae.b_enc.copy_(torch.randn(D_SAE, generator=generator) * sample.float().std() * 0.3)
    return sae.to(sample.dtype).requires_grad_(False).eval()


@pytest.fixture(params=["topk", "standard", "standard_sparse"])
def sae(request: pytest.FixtureRequest, case: Case) -> SparseAutoencoder:
    return make_sae(request.param, case.activation(case.middle))
