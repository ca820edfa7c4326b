"""CE recovered means what it says: 1 for a perfect dictionary, 0 for one that gives zero, the middle in between."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from saekit import RunContext
from saekit.builtin.model_metrics import CERecovered
from saekit.builtin.sources import TextSource
from saekit.config import EvaluationConfig, TrainingConfig


@pytest.fixture
def source(tiny_gpt2: Path, text_file: Path) -> TextSource:
    """A source on a tiny GPT-2 whose middle block matters: its output is amplified, so that ablating it costs."""
    source = TextSource(model=str(tiny_gpt2), hook_point="blocks.1.hook_out", data=str(text_file), context=32, held_out=0.3)
    source.open(device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        source.subject.model.transformer.wte.weight.mul_(20)  # tied: confident logits
    return source


# The model is random, so that an ablation may well help; -inf lets the share be computed all the same.
def measured(source: TextSource, sae: nn.Module, min_cost: float = 0.01) -> tuple[dict[str, float | None], list[str]]:
    warnings: list[str] = []
    config = SimpleNamespace(training=TrainingConfig(), evaluation=EvaluationConfig(tokens=300))
    context = RunContext(sae, source, config, torch.device("cpu"), Path(), warnings.append)
    return CERecovered(tokens=300, rows=3, min_cost=min_cost).measure(context), warnings


class Times(nn.Module):
    """Gives its input times a number: a stand-in for an SAE."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.ndim == 2
        return x * self.factor


def test_a_perfect_dictionary_recovers_everything(source: TextSource) -> None:
    values, _ = measured(source, Times(1.0), min_cost=-math.inf)
    assert values["ce_recovered"] == pytest.approx(1.0, abs=1e-6)
    assert values["ce_spliced"] == pytest.approx(values["ce_clean"], abs=1e-6)
    assert values["kl"] == pytest.approx(0.0, abs=1e-6)


def test_a_dictionary_of_nothing_equals_zero_ablation(source: TextSource) -> None:
    values, _ = measured(source, Times(0.0), min_cost=-math.inf)
    assert values["ce_spliced"] == pytest.approx(values["ce_zero"], abs=1e-6)
    assert values["ce_recovered"] == pytest.approx(0.0, abs=1e-6)
    assert values["kl"] > 0


def test_values_equal_a_plain_loop(source: TextSource) -> None:
    """Row by row, token by token, with the replacement written out by hand."""
    values, _ = measured(source, Times(0.5), min_cost=-math.inf)
    model, site = source.subject.model, source.subject.site
    nll, kl, n = 0.0, 0.0, 0
    for batch in source.token_batches("held_out", rows=3):
        for row in range(len(batch.tokens)):
            length = int(batch.mask[row].sum())
            ids = batch.tokens[row : row + 1, :length]

            def halved(x: torch.Tensor) -> torch.Tensor:
                return torch.cat([x[:, :1], x[:, 1:] * 0.5], 1)  # the first position is not replaced

            with torch.no_grad():
                clean = model(ids).logits[0].log_softmax(-1)
                with site.replaced(halved):
                    changed = model(ids).logits[0].log_softmax(-1)
            for t in range(1, length - 1):
                nll -= float(changed[t, ids[0, t + 1]])
                kl += float((clean[t].exp() * (clean[t] - changed[t])).sum())
                n += 1
        if n >= 300:
            break
    assert values["ce_spliced"] == pytest.approx(nll / n, abs=1e-5)
    assert values["kl"] == pytest.approx(kl / n, abs=1e-5)


def test_where_ablation_costs_nothing_the_share_is_null_with_a_reason(source: TextSource) -> None:
    values, warnings = measured(source, Times(1.0), min_cost=math.inf)
    assert values["ce_recovered"] is None
    assert values["ce_recovered_mean"] is None
    assert "not defined" in warnings[0]
    assert "zero-ablation" in warnings[0]
