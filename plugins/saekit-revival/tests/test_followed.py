"""What is said of revived latents is what became of them."""

import pytest
import torch
from saekit_revival.resample import Resample
from saekit_revival.revivals import Revivals

import saekit.testing
from saekit import Training, hookimpl
from saekit.testing import check, tiny_run
from saekit.training.state import restore, state_of

test_conformance = saekit.testing.conformance("callback", "revivals", options={"every": 2, "after": 3, "control": 2})

F, BATCH = 32, 64
DEAD = [3, 17, 30]


class Planted(Resample):
    """Silences all revived latents but one, and all redrawn ones, five steps after they got their weights."""

    @hookimpl
    def step_ended(self, trainer: Training, number: int) -> None:
        super().step_ended(trainer, number)
        if number == 15:
            since = self.followed.since
            gone = [j for j in range(F) if since[0, j] > 0 or since[1, j] > 0][1:]
            trainer.sae.shift_pre_activations(torch.zeros(F).index_fill_(0, torch.tensor(gone), -1e6))
            self.survivor = next(j for j in range(F) if since[0, j] > 0 or since[1, j] > 0)


def test_the_report_counts_who_is_alive_after_so_many_steps(trainer_with, batches) -> None:
    callback = Planted(at=[10], after=40, below=1e-3, memory=0.5, encoder_scale=3.0, control=2)
    trainer = trainer_with(callback)
    for batch in batches(49):
        trainer.train_on(batch)
    assert callback.result().scalars["revived_alive_share"] is None
    assert "less than 40 steps before the end" in callback.result().notes[0]
    for batch in batches(1, seed=9):
        trainer.train_on(batch)
    (event,) = callback.followed.events
    assert callback.survivor == DEAD[0] or callback.followed.since[1, callback.survivor] == 10
    of_dead = callback.survivor in DEAD
    alive = bool(callback.usage.value()[callback.survivor] >= 1e-3)
    assert event["revived"] == 3 and event["redrawn"] == 2 and event["left"] == 3
    assert event["revived_alive"] == (of_dead and alive) and event["redrawn_alive"] == (not of_dead and alive)
    scalars = callback.result().scalars
    assert scalars["revived_alive_share_n"] == 3 and scalars["redrawn_alive_share_n"] == 2
    assert scalars["revived_alive_share_low"] <= scalars["revived_alive_share"] <= scalars["revived_alive_share_high"]


def test_who_is_revived_again_before_has_not_lived_and_controls_are_living(trainer_with, batches) -> None:
    callback = Resample(at=[10, 20], after=15, below=1e-3, memory=0.5)
    trainer = trainer_with(callback)
    for batch in batches(40):
        trainer.train_on(batch)
        if trainer.number < 20:
            trainer.sae.shift_pre_activations(torch.zeros(F).index_fill_(0, torch.tensor(DEAD), -1e6))
    first, second = callback.followed.events
    assert first["revived"] == second["revived"] == 3
    assert first["revived_alive"] == 0  # though all three lived at step 25, with the weights of step 20
    assert second["left_alive"] == 3
    left = (callback.followed.since[2] > 0).nonzero().squeeze(1).tolist()
    assert not set(left) & set(DEAD)


def test_latents_that_come_back_by_themselves_are_counted_by_revivals(trainer_with, batches) -> None:
    watch = Revivals(every=5, after=10)
    trainer = trainer_with(watch)
    trainer.firing.dead_after, trainer.firing.check_every = 5 * BATCH, 1
    for batch in batches(8):
        trainer.train_on(batch)
    trainer.sae.shift_pre_activations(torch.zeros(F).index_fill_(0, torch.tensor(DEAD[:2]), 1e6 + 3.0))
    for batch in batches(20, seed=3):
        trainer.train_on(batch)
    events = [event for event in watch.followed.events if event["step"] == 10]
    assert len(events) == 1 and events[0]["revived"] >= 2 and events[0]["revived_alive"] >= 2
    assert "alive" in watch.result().notes[0]


def test_the_state_of_what_is_followed_survives(trainer_with, batches) -> None:
    first, second = (Resample(at=[5], after=20, below=1e-3, memory=0.5, control=1) for _ in range(2))
    a, b = trainer_with(first), trainer_with(second)
    for batch in batches(10):
        a.train_on(batch)
    tensors, values = state_of(a)
    restore(b, a.number, {k: v.clone() for k, v in tensors.items()}, values)
    for trainer in (a, b):
        for batch in batches(20, seed=2):
            trainer.train_on(batch)
    assert first.result() == second.result()
    assert first.followed.events[0]["revived_alive"] is not None


def test_the_report_reaches_the_run_and_its_analyzers(tmp_path) -> None:
    callbacks = [{"use": "resample", "at": [4], "below": 0.2, "after": 3}, {"use": "revivals", "every": 2}]
    run = tiny_run(tmp_path / "run", callback=callbacks)
    found = run.context.found["resample"]
    assert found.scalars["revived"] > 0 and found.scalars["revived_alive_share_n"] > 0
    assert run.summary["analysis"]["resample"]["revived"] == found.scalars["revived"]


@pytest.mark.parametrize("options", [{"at": [3, 6], "below": 0.2, "after": 2, "control": 2}])
def test_resampling_at_steps_with_a_control_conforms(options: dict) -> None:
    report = check("callback", "resample", options=options)
    assert report.ok, report
