"""The model is trained once, the same from the same seed, and a stopped training goes on exactly."""

import pytest
import torch
from saekit_gear import prepare
from saekit_gear.completion import completion_loss
from saekit_gear.prepare import Training, trained
from saekit_gear.sets import generate

SMALL = Training(steps=6, batch=16, warm_up=2)


@pytest.fixture(autouse=True)
def saved_often(monkeypatch):
    monkeypatch.setattr(prepare, "_SAVE_EVERY", 2)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_same_seed_gives_the_same_model_and_leaves_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    first = trained(SMALL, directory=tmp_path / "a")
    drawn = torch.rand(1)
    torch.manual_seed(6)
    again = trained(SMALL, directory=tmp_path / "b")
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1)) and same(first, again)
    assert not same(first, trained(Training(seed=1, steps=6, batch=16, warm_up=2), directory=tmp_path / "a"))


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_a_stopped_training_goes_on_exactly(tmp_path, monkeypatch, stop_at):
    expected = trained(SMALL, directory=tmp_path / "whole")
    steps = []

    def stops(n, seed):
        steps.append(seed[-1])
        if seed[-1] == stop_at:
            raise KeyboardInterrupt
        return generate(n, seed)

    monkeypatch.setattr(prepare, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        trained(SMALL, directory=tmp_path / "stopped")
    stop_at, steps[:] = -1, []
    assert same(trained(SMALL, directory=tmp_path / "stopped"), expected)
    assert steps[0] in (0, 2, 4) and len(steps) == 6 - steps[0]


def test_it_learns(tmp_path):
    items, mask, _ = generate(256, (9,))
    missing = torch.zeros_like(mask)
    missing[:, 0] = True
    loss = [
        float(completion_loss(trained(training, directory=tmp_path), items, mask, missing).detach())
        for training in (Training(steps=0), Training(steps=40, batch=32, warm_up=5))
    ]
    assert loss[1] < loss[0] - 0.2
