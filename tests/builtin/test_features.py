"""The analyzer `features` finds what was planted: densities, maxima, and the places where a latent fires most."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saekit import Activations, ComponentError, Items, RunContext, UsageError, example_of
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
    result = Features(latents=[1], examples=4, quantiles=0, window=2)(context)
    rows = result.tables["examples"]
    assert [row["activation"] for row in rows] == [5.0, 4.0, 3.0, 2.0]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    first, last = example_of(rows[0]["example"]), example_of(rows[3]["example"])
    assert first.parts == ["<52>", "<53>", "<54>", "<55>", "<56>"] and first.at == 2
    assert last.activations == [0, 0, 2.0, 1.9, 0]
    assert result.tables["latents"][0]["example"] == "<52><53>【<54>】<55><56>"


def test_a_window_does_not_run_into_another_row(context: RunContext) -> None:
    (row,) = Features(latents=[1], examples=1, quantiles=0, window=50)(context).tables["examples"]
    assert row["example"]["parts"] == [f"<{t}>" for t in range(50, 60)]


def test_quantile_examples_are_spread_over_all_places_at_which_a_latent_fires(context: RunContext) -> None:
    rows = Features(latents=[1], examples=1, quantiles=3)(context).tables["examples"]
    assert [(row["quantile"], row["activation"]) for row in rows[1:]] == [  # of 5, 4, 3, 2, 1.9 and 1
        (pytest.approx(1 - 1.5 / 6, abs=1e-4), 4.0),
        (pytest.approx(1 - 3.5 / 6, abs=1e-4), 2.0),
        (pytest.approx(1 - 5.5 / 6, abs=1e-4), 1.0),
    ]


def test_latents_come_by_score_and_within_densities(context: RunContext) -> None:
    by_score = Features(order="score", examples=1)(context)
    assert [row["latent"] for row in by_score.tables["latents"]] == [1, 0]  # 2.82 / sqrt(0.1) and 0.5 / sqrt(1)
    assert by_score.tables["latents"][0]["score"] == pytest.approx(16.9 / 6 / 0.1**0.5)
    few = Features(min_density=0.01, max_density=0.3, examples=1)(context)
    assert [row["latent"] for row in few.tables["latents"]] == [1] and few.scalars["within_densities"] == 1
    none = Features(min_density=0.2, max_density=0.3, examples=1)(context)
    assert none.tables["latents"] == [] and "Change min_density or max_density" in none.notes[0]
    with pytest.raises(UsageError, match=r"^min_density: 0\.5 is above max_density = 0\.1"):
        Features(min_density=0.5, max_density=0.1)


def test_a_source_shows_its_own_examples(context: RunContext) -> None:
    context.source.examples = lambda sequence, position: [
        Items(parts=["shoes", f"shirt {s}"], caption=f"at {p}") for s, p in zip(sequence.tolist(), position.tolist(), strict=True)
    ]
    (row,) = Features(latents=[1], examples=1, quantiles=0)(context).tables["examples"]
    assert row["example"] == {"kind": "set", "caption": "at 4", "parts": ["shoes", "shirt 5"]}


def test_without_tokens_the_numbers_of_the_activation_are_shown(context: RunContext) -> None:
    class Numbered(Planted):
        def blocks(self, split: str, **options):
            for block in super().blocks(split, **options):
                yield Activations(block.x)

    context.source = Numbered()
    rows = Features(latents=[1], examples=2, quantiles=0)(context).tables["examples"]
    assert [row["example"] for row in rows] == [
        {"kind": "numbers", "values": [0.5, 5.0], "shape": [2]},
        {"kind": "numbers", "values": [0.5, 4.0], "shape": [2]},
    ]


def test_a_source_with_too_few_examples_is_told(context: RunContext) -> None:
    context.source.examples = lambda sequence, position: []
    with pytest.raises(ComponentError, match="gave 0 examples for 1 places"):
        Features(latents=[1], examples=1, quantiles=0)(context)


def test_nothing_alive_is_said_plainly(context: RunContext) -> None:
    context.sae.b_enc.fill_(-100.0)
    result = Features()(context)
    assert result.tables["examples"] == []
    assert "No latent fired on 60" in result.notes[0]


def test_a_latent_out_of_range_is_refused(context: RunContext) -> None:
    with pytest.raises(UsageError, match=r"^latents: .*0 to 2"):
        Features(latents=[3])(context)
