"""Known causes: latents that make up an answer directly, behind a saturated readout, or where one of two is enough."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from saekit_attribution.effects.attribute import attribute
from saekit_attribution.effects.fidelity import fidelity
from saekit_attribution.effects.methods import METHODS, Attribution
from saekit_attribution.labelled_data.teacher_forcing import Sample
from torch import Tensor, nn

from saekit import SparseAutoencoder
from saekit.builtin.architectures.standard import Standard

D, LATENTS, VOCABULARY = 20, 16, 40  # four directions of the activation are in no latent
TARGET, BASE = 3, 5


class Planted(nn.Module):
    """tokens [n, T] -> logits [n, T, 40]. A token's activation holds known amounts of 16 orthonormal directions, and the
    logit of token 3 is `readout` of the amounts [n, T, 20]; all others are 0."""

    def __init__(self, readout: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        directions = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]
        self.register_buffer("directions", directions)
        amounts = torch.rand(VOCABULARY, D, generator=generator, dtype=torch.float64) + 0.5
        amounts *= torch.rand(VOCABULARY, D, generator=generator) < 0.6
        amounts[:, :8] = amounts[:, :8].clamp_min(0.5)  # the causes are there in every token
        self.embed = nn.Embedding.from_pretrained(amounts @ directions)
        self.site = nn.Identity()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.readout = readout

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        amounts = self.site(self.embed(tokens)) @ self.directions.T
        logits = torch.zeros(*tokens.shape, VOCABULARY, dtype=amounts.dtype)
        logits[..., TARGET] = self.scale * self.readout(amounts)
        return logits


def dictionary(model: Planted) -> SparseAutoencoder:
    """The SAE that knows the first 16 directions exactly; the other four are its error."""
    sae = Standard(D, LATENTS).double()
    with torch.no_grad():
        sae.W_dec.copy_(model.directions[:LATENTS])
        sae.W_enc.copy_(model.directions[:LATENTS].T)
    return sae.eval()


def attributions(
    tiny, readout: Callable[[Tensor], Tensor], positions: str = "decisive"
) -> list[dict[str, Attribution]]:
    model = Planted(readout).eval()
    subject = tiny.subject(model, "site")
    generator = torch.Generator().manual_seed(1)
    samples = []
    for length in (4, 6, 6, 4, 5):
        tokens = tuple(torch.randint(2, VOCABULARY, (length,), generator=generator).tolist())
        samples.append(Sample(tokens, TARGET, BASE, (), (-1,) * length))
    return attribute(subject, dictionary(model), samples, methods=METHODS, positions=positions, steps=64)


def top(attribution: Attribution, n: int) -> list[int]:
    return attribution.latents[attribution.scores.abs().argsort(descending=True)[:n]].tolist()


def score(attribution: Attribution, latent: int) -> float:
    return float(attribution.scores[attribution.latents == latent])


def causes(amounts: Tensor) -> Tensor:
    """Latents 2 and 5 promote and 7 suppresses, slightly nonlinearly; 18 is in no latent. Earlier positions count too."""
    seen = amounts + 0.5 * amounts.cumsum(1)
    gentle = 10 * torch.tanh(0.1 * seen)
    return 8 * gentle[..., 2] + 4 * gentle[..., 5] - 2 * gentle[..., 7] + gentle[..., 18]


@pytest.mark.parametrize("positions", ["decisive", "all"])
def test_planted_causes_are_ranked_right_by_all_methods(tiny, positions: str) -> None:
    for found in attributions(tiny, causes, positions):
        exact = found["exact"]
        order = exact.latents[exact.scores.abs().argsort(descending=True)].tolist()
        assert set(order[:3]) == {2, 5, 7}
        for method in METHODS:
            assert top(found[method], 3) == order[:3]
            assert score(found[method], 2) > 0
            assert score(found[method], 5) > 0
            assert score(found[method], 7) < 0
            others = ~torch.isin(found[method].latents, torch.tensor([2, 5, 7]))
            assert float(found[method].scores[others].abs().max()) < 1e-9, "what is not a cause has no effect"
            assert fidelity(found[method], exact).pearson > 0.99
        assert abs(exact.error) > 0.1 or exact.error == pytest.approx(found["ig"].error, abs=1e-6)


def saturated(amounts: Tensor) -> Tensor:
    """Latent 2 decides, through a readout that saturates well below its activation; latent 5 helps a little, linearly."""
    return 6 * torch.tanh(12 * amounts[..., 2]) + 0.5 * amounts[..., 5]


def test_where_the_readout_is_saturated_atp_is_wrong_and_exact_is_right(tiny) -> None:
    for found in attributions(tiny, saturated):
        atp, ig, exact = (found[method] for method in METHODS)
        assert exact.logit_diff > 6
        assert score(exact, 2) == pytest.approx(6, abs=1e-3), "without latent 2 the answer is gone"
        assert top(exact, 2) == [2, 5]
        assert abs(score(atp, 2)) < 0.01 * score(exact, 2), "the gradient at a plateau is nothing"
        assert top(atp, 1) == [5]
        assert top(ig, 2) == [2, 5]
        assert score(ig, 2) == pytest.approx(6, rel=0.02), "on the way from zero the slope is met"
        gaps = {method: abs(fidelity(found[method], exact).completeness_gap) for method in METHODS}
        assert gaps["atp"] > 5
        assert gaps["ig"] < 0.1
        assert gaps["exact"] < 0.1
        assert fidelity(atp, exact).pearson < 0.5 < 0.99 < fidelity(ig, exact).pearson


def either(amounts: Tensor) -> Tensor:
    """Latents 2 and 5 have the same effect, and one of them is enough."""
    return 6 * torch.tanh(8 * (amounts[..., 2] + amounts[..., 5]))


def test_where_one_of_two_is_enough_single_effects_miss_what_both_do(tiny) -> None:
    for found in attributions(tiny, either):
        assert found["exact"].moved == pytest.approx(6, abs=1e-3), "both together are the whole answer"
        assert score(found["exact"], 2) < 0.01
        assert score(found["exact"], 5) < 0.01
        assert abs(score(found["atp"], 2)) + abs(score(found["atp"], 5)) < 0.01
        assert fidelity(found["exact"], found["exact"]).completeness_gap == pytest.approx(-6, abs=0.01)
        assert score(found["ig"], 2) + score(found["ig"], 5) == pytest.approx(6, rel=0.05)
        assert min(score(found["ig"], 2), score(found["ig"], 5)) > 1
