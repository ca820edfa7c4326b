"""What a checkpoint holds of several SAEs comes back to each of them, through the files, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from saekit import Activations
from saekit.config import TrainingConfig
from saekit.hookspecs import hookimpl
from saekit.listeners import Listener, Listeners
from saekit.plugins import Registry
from saekit.testing import make_step
from saekit.training.loss_terms import Term
from saekit.training.state import RunState
from saekit.training.trainer import Trainer

BATCH = 16


class Noise:
    """A listener that changes the weights by what it draws and by how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    @hookimpl
    def step_ended(self, trainer: Any) -> None:
        self.calls += 1
        noise = torch.randn(trainer.sae.b_enc.shape, generator=trainer.generator)
        with torch.no_grad():
            trainer.sae.b_enc.add_(1e-3 * self.calls * noise)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def trainer_of(variant: str, seed: int) -> Trainer:
    listeners = Listeners()
    listeners.add(Listener("callback.noise", Noise(), "callback 'noise'", vital=True))
    term = Term("mse", lambda step: step.error.square().mean(), 1.0, Registry().find("loss", "mse"))
    config = TrainingConfig(tokens=BATCH * 50, batch_size=BATCH, seed=seed)
    sae = make_step(seed=seed).sae
    return Trainer(
        sae, [term], config, total_steps=50, scale=1.0 + seed, device=torch.device("cpu"), listeners=listeners, variant=variant
    )


def trained(trainers: list[Trainer], steps: range) -> None:
    for number in steps:
        draws = torch.Generator().manual_seed(number)
        batch = Activations(torch.randn(BATCH, trainers[0].sae.d_in, generator=draws))
        for trainer in trainers:
            trainer.train_on(batch)


def test_each_sae_goes_on_from_its_own_state(tmp_path: Path) -> None:
    ours = [trainer_of("a", 1), trainer_of("b", 2)]
    trained(ours, range(7))
    plugins = [{"name": "p", "distribution": "d", "version": "1"}]
    state = RunState(7, (3, 4), {"training.lr": 1e-3}, plugins, 1, ["a warning"], {"a": [], "b": ["another"]})
    for trainer in ours:
        state.add(trainer)
    path = state.save(tmp_path, keep=1)
    found = RunState.newest(tmp_path)
    assert found is not None
    where, back, warnings = found
    assert (where, warnings) == (path, [])
    for name in ("step", "position", "decisive", "plugins", "threads", "warnings", "warnings_of", "trainer"):
        assert getattr(back, name) == getattr(state, name), name
    resumed = [trainer_of("a", 3), trainer_of("b", 4)]  # with other weights, other draws, another scale
    for trainer in resumed:
        back.restore(trainer)
    for both in (ours, resumed):
        trained(both, range(7, 15))
    for one, other in zip(ours, resumed, strict=True):
        assert (other.number, other.scale) == (15, one.scale)
        for name, weight in one.sae.state_dict().items():
            assert torch.equal(weight, other.sae.state_dict()[name]), name
        assert torch.equal(one.firing.silent, other.firing.silent)


def test_where_there_is_no_checkpoint_there_is_no_state(tmp_path: Path) -> None:
    assert RunState.newest(tmp_path) is None
