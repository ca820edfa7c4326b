"""The analyzer `features` finds what was planted: densities, maxima, and the places where a latent fires most."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saekit import Activations, RunContext, UsageError
from saekit.builtin.architectures.standard import Standard
from saekit.builtin.features import Features
from saekit.config import EvaluationConfig, TrainingConfig

ROWS, LENGTH = 6, 10


class Planted:
    """Six rows of ten tokens in two dimensions; the second coordinate is the row's number at position 4, else -1."""

    def blocks(self, split: str, *, size: int, seed: int, start: int = 0):
        x = torch.full((ROWS, LENGTH, 2), -1.0)
        x[:, :, 0] = 0.5
        x[:, 4, 1] = torch.arange(ROWS).float()
        x[2, 5, 1] = 1.9  # a second, weaker place in row 2
        yield Activations(
            x.view(-1, 2),
            tokens=torch.arange(ROWS * LENGTH),
            sequence=torch.arange(ROWS).repeat_interleave(LENGTH),
            position=torch.arange(LENGTH).repeat(ROWS),
        )

    def token_strings(self, tokens: torch.Tensor) -> list[str]:
        return [f"<{int(t)}>" for t in tokens]


@pytest.fixture
def context() -> RunContext:
    """An SAE of three latents: the first fires everywhere, the second at the planted places, the third never."""
    sae = Standard(2, 3, decoder_norm="free").requires_grad_(False)
    sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    sae.b_enc.copy_(torch.tensor([0.0, 0.0, -1.0]))
    sae.W_dec.zero_()
    config = SimpleNamespace(training=TrainingConfig(), evaluation=EvaluationConfig(tokens=1000, batch_size=7))
    return RunContext(sae, Planted(), config, torch.device("cpu"), Path(), lambda message: None)


def test_statistics_are_those_of_the_planted_code(context: RunContext) -> None:
    result = Features()(context)
    latents = {row["latent"]: row for row in result.tables["latents"]}
    assert set(latents) == {0, 1}  # the dead one is not shown
    assert result.scalars["dead"] == 1
    assert latents[0]["density"] == 1.0
    assert latents[1]["density"] == pytest.approx(6 / 60)  # rows 1 to 5 (row 0 holds zero), and the second place in row 2
    assert latents[1]["max_activation"] == 5.0
    assert latents[1]["mean_activation"] == pytest.approx((1 + 2 + 3 + 4 + 5 + 1.9) / 6)


def test_examples_are_the_strongest_place_of_each_row_in_order(context: RunContext) -> None:
    result = Features(latents=[1], examples=4, window=2)(context)
    examples = result.tables["examples"]
    assert [e["activation"] for e in examples] == [5.0, 4.0, 3.0, 2.0]
    assert [e["rank"] for e in examples] == [1, 2, 3, 4]
    assert examples[0]["token"] == "<54>"
    assert examples[0]["before"] == "<52><53>"
    assert examples[0]["after"] == "<55><56>"
    assert examples[3]["activations"] == [0, 0, 2.0, 1.9, 0]


def test_a_window_does_not_run_into_another_row(context: RunContext) -> None:
    (example,) = Features(latents=[1], examples=1, window=50)(context).tables["examples"]
    assert example["tokens"] == [f"<{t}>" for t in range(50, 60)]


def test_nothing_alive_is_said_plainly(context: RunContext) -> None:
    context.sae.b_enc.fill_(-100.0)
    result = Features()(context)
    assert result.tables["examples"] == []
    assert "No latent fired on 60" in result.notes[0]


def test_a_latent_out_of_range_is_refused(context: RunContext) -> None:
    with pytest.raises(UsageError, match=r"^latents: .*0 to 2"):
        Features(latents=[3])(context)
