"""Two hundred steps by the sparse and by the dense path, from one seed, end at the same weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from saekit import Activations, SparseAutoencoder
from saekit.builtin.architectures.batchtopk import BatchTopK
from saekit.builtin.architectures.clipped import Clipped
from saekit.builtin.architectures.gated import Gated
from saekit.builtin.architectures.jumprelu import JumpReLU
from saekit.builtin.architectures.standard import Standard
from saekit.builtin.architectures.topk import TopK
from saekit.builtin.losses import AuxK, gate_sum, gated_aux, l1, mse
from saekit.config import TrainingConfig
from saekit.listeners import Listeners
from saekit.sae.code import Code, SparseCode
from saekit.training.loss_terms import Term
from saekit.training.trainer import Trainer

D, F, BATCH, STEPS = 16, 64, 64, 200


def densely(architecture: type[SparseAutoencoder]) -> type[SparseAutoencoder]:
    """The architecture with its code held whole and decoded by a dense product: autograd does the rest."""

    class Densely(architecture):  # type: ignore[valid-type, misc]
        def gate(self, x: Tensor) -> Code:
            return self.dense_code(x, super().gate(x).dense())

    return Densely


def always(sae: SparseAutoencoder, density: float) -> SparseAutoencoder:
    """Fix the way a ReLU code is made."""
    sae._density, sae._batches, sae.look_every = density, 1, 10**9
    return sae


PAIRS = {
    "standard": (lambda: always(Standard(D, F), 0.0), lambda: always(Standard(D, F), 1.0)),
    "clipped": (lambda: always(Clipped(D, F), 0.0), lambda: always(Clipped(D, F), 1.0)),
    "topk": (lambda: TopK(D, F, k=4), lambda: densely(TopK)(D, F, k=4)),
    "batchtopk": (lambda: BatchTopK(D, F, k=4), lambda: densely(BatchTopK)(D, F, k=4)),
    "jumprelu": (lambda: JumpReLU(D, F), lambda: JumpReLU(D, F)),
    "gated": (lambda: Gated(D, F), lambda: Gated(D, F)),
}


def trained(sae: SparseAutoencoder, name: str) -> dict[str, Tensor]:
    """The weights after training in float64 on a planted dictionary."""
    generator = torch.Generator().manual_seed(3)
    truth = torch.nn.functional.normalize(torch.randn(40, D, generator=generator, dtype=torch.float64), dim=1)
    sae.double()
    sae.initialise(generator, torch.zeros(10, D, dtype=torch.float64))
    losses = {"mse": (mse, 1.0), "auxk": (AuxK(), 0.03)}
    if name in ("standard", "clipped"):
        losses["l1"] = (l1, 1e-3)
    if name == "jumprelu":
        losses["l0"] = (gate_sum, 1e-4)
    if name == "gated":
        losses |= {"gate_l1": (gate_sum, 1e-3), "gated_aux": (gated_aux, 1.0)}
    terms = [Term(label, f, w, SimpleNamespace(origin=label)) for label, (f, w) in losses.items()]
    config = TrainingConfig(tokens=BATCH * STEPS, batch_size=BATCH, lr=3e-3, dead_after=BATCH * 20)
    trainer = Trainer(
        sae, terms, config, total_steps=STEPS, scale=1.0, device=torch.device("cpu"), listeners=Listeners()
    )
    for _ in range(STEPS):
        active = (torch.rand(BATCH, 40, generator=generator) < 0.08).double()
        x = active * torch.rand(BATCH, 40, generator=generator).double() @ truth
        trainer.train_on(Activations(x))
    return {key: value.detach().clone() for key, value in sae.state_dict().items()}


@pytest.mark.parametrize("name", ["standard", "clipped", "topk", "batchtopk"])
def test_both_paths_end_at_the_same_weights(name: str) -> None:
    sparse, dense = (trained(make(), name) for make in PAIRS[name])
    for key in sparse:
        scale = float(dense[key].abs().max())
        assert float((sparse[key] - dense[key]).abs().max()) <= 1e-6 * max(scale, 1e-12), key


@pytest.mark.parametrize("name", ["jumprelu", "gated"])
def test_gates_that_learn_by_themselves_end_where_a_dense_engine_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These have no dense form of their own: here the kernels are replaced by dense products with autograd."""
    sparse = trained(PAIRS[name][0](), name)

    def dense_pre_at(self, x: Tensor, pre: Tensor, pattern) -> Tensor:
        product = (x - self.b_dec) @ self.W_enc
        return (product if self.b_enc is None else product + self.b_enc)[pattern.rows, pattern.indices]

    def dense_decode(self, code: Code) -> Tensor:
        assert isinstance(code, SparseCode)
        return code.dense() @ self.W_dec + self.b_dec

    monkeypatch.setattr(SparseAutoencoder, "pre_at", dense_pre_at)
    monkeypatch.setattr(SparseAutoencoder, "decode", dense_decode)
    dense = trained(PAIRS[name][1](), name)
    for key in sparse:
        scale = float(dense[key].abs().max())
        assert float((sparse[key] - dense[key]).abs().max()) <= 1e-6 * max(scale, 1e-12), key
