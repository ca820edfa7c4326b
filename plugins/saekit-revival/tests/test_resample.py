"""`resample` gives dead latents new weights as Bricken et al. (2023) describe, and touches nothing else."""

from types import SimpleNamespace

import pytest
import torch
from saekit_revival.resample import Resample
from torch import Tensor

from saekit import Code, OptionError, SparseAutoencoder
from saekit.builtin.architectures.gated import Gated
from saekit.builtin.architectures.jumprelu import JumpReLU
from saekit.builtin.architectures.standard import Standard
from saekit.builtin.architectures.topk import TopK
from saekit.training.state import restore, state_of

D, F, BATCH = 8, 32, 64
DEAD = [3, 17, 30]


def test_dead_latents_get_unit_inputs_small_encoders_and_fresh_moments(trainer_with, batches) -> None:
    callback = Resample(every=1000, below=1e-4)
    trainer = trainer_with(callback)
    for batch in batches(10):
        trainer.train_on(batch)
    before = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
    moment = trainer.optimizer.state[trainer.sae.W_dec]["exp_avg"].clone()
    dead = callback.resample(trainer)
    assert sorted(dead.tolist()) == DEAD
    sae, alive = trainer.sae, [j for j in range(F) if j not in DEAD]
    torch.testing.assert_close(sae.W_dec[DEAD].norm(dim=1), torch.ones(3))
    cosine = torch.nn.functional.cosine_similarity(sae.W_enc[:, DEAD].T, sae.W_dec[DEAD], dim=1)
    torch.testing.assert_close(cosine, torch.ones(3))
    inputs = torch.nn.functional.normalize(sae.centred(trainer.step.x), dim=1)
    assert ((sae.W_dec[DEAD] @ inputs.T).max(1).values > 1 - 1e-5).all()
    wanted = 0.2 * before["W_enc"][:, alive].norm(dim=0).mean()
    torch.testing.assert_close(sae.W_enc[:, DEAD].norm(dim=0), wanted.expand(3))
    assert sae.b_enc[DEAD].eq(0).all()
    for name, parameter in (("W_dec", sae.W_dec[alive]), ("b_enc", sae.b_enc[alive]), ("W_enc", sae.W_enc[:, alive])):
        was = before[name][:, alive] if name == "W_enc" else before[name][alive]
        assert torch.equal(parameter, was)
    after = trainer.optimizer.state[sae.W_dec]["exp_avg"]
    assert after[DEAD].eq(0).all()
    assert torch.equal(after[alive], moment[alive])
    for parameter in (sae.W_enc, sae.b_enc):
        for key in ("exp_avg", "exp_avg_sq"):
            state = trainer.optimizer.state[parameter][key]
            assert (state[:, DEAD] if state.ndim == 2 else state[DEAD]).eq(0).all()


def test_the_gates_of_a_gated_sae_begin_anew_too(trainer_with, batches) -> None:
    callback, sae = Resample(every=1000, below=1e-4), Gated(D, F)
    trainer = trainer_with(callback, sae)
    for bias in (sae.b_mag, sae.r_mag):
        bias.data[DEAD] = -10.0
    for batch in batches(10):
        trainer.train_on(batch)
    assert set(DEAD) <= set(callback.resample(trainer).tolist())
    for bias in (sae.b_gate, sae.b_mag, sae.r_mag):
        assert bias[DEAD].eq(0).all()


class Sharpened(SparseAutoencoder):
    """A third party's: no b_enc, but a bar and a sharpness for each latent."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__(d_in, d_sae)
        self.register_parameter("b_enc", None)
        self.bar = torch.nn.Parameter(torch.zeros(d_sae))
        self.sharpness = torch.nn.Parameter(torch.ones(d_sae))

    @property
    def latent_parameters(self) -> dict[str, float]:
        return {"bar": 0.0, "sharpness": 1.0}

    def shift_pre_activations(self, by: Tensor | float) -> None:
        self.bar.data.sub_(by)

    def pre_activations(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        pre = self.centred(x) @ self.W_enc - self.bar
        return pre if latents is None else pre[:, latents]

    def gate(self, x: Tensor) -> Code:
        return self.dense_code(x, self.sharpness * self.pre_activations(x).relu())


def test_an_architecture_with_parameters_of_its_own_is_revived_with_their_first_values(trainer_with, batches) -> None:
    callback, sae = Resample(every=1000, below=1e-4), Sharpened(D, F)
    trainer = trainer_with(callback, sae)
    sae.sharpness.data[DEAD] = 0.01
    for batch in batches(10):
        trainer.train_on(batch)
    assert set(DEAD) <= set(callback.resample(trainer).tolist())
    assert sae.bar[DEAD].eq(0).all() and sae.sharpness[DEAD].eq(1).all()
    for parameter in (sae.bar, sae.sharpness):
        assert trainer.optimizer.state[parameter]["exp_avg"][DEAD].eq(0).all()
    assert sae.encode(next(iter(batches(1, seed=4))).x).fired()[DEAD].gt(0).all()


def test_a_jumprelu_latent_gets_its_first_threshold_back(trainer_with, batches) -> None:
    """Otherwise a threshold that rose out of reach would keep the latent dead."""
    callback, sae = Resample(every=1000, below=1e-4), JumpReLU(D, F, threshold=0.05)
    trainer = trainer_with(callback, sae)
    sae.threshold.data[DEAD] = 1e6
    for batch in batches(10):
        trainer.train_on(batch)
    assert set(DEAD) <= set(callback.resample(trainer).tolist())
    assert torch.equal(sae.threshold[DEAD], torch.full((3,), 0.05))


def test_decoder_rows_that_are_left_alone_get_the_norm_of_the_living(trainer_with, batches) -> None:
    callback = Resample(every=1000, below=1e-4)
    trainer = trainer_with(callback, Standard(D, F))
    for batch in batches(10):
        trainer.train_on(batch)
    norms = trainer.sae.W_dec.detach().norm(dim=1)
    dead = callback.resample(trainer).tolist()
    wanted = norms[[j for j in range(F) if j not in dead]].mean()
    assert dead == DEAD and float(wanted) < 0.5
    torch.testing.assert_close(trainer.sae.W_dec[DEAD].norm(dim=1), wanted.expand(3))


def test_resampled_latents_fire_again(trainer_with, batches) -> None:
    revived, left = Resample(every=10, below=1e-4), Resample(every=10_000, below=1e-4)
    fired = {}
    for name, callback in (("revived", revived), ("left", left)):
        trainer = trainer_with(callback, Standard(D, F))  # with top-k, a small encoder has to grow first
        total = torch.zeros(F)
        for batch in batches(60):
            trainer.train_on(batch)
            total += trainer.fired
        fired[name] = total[DEAD]
    assert fired["left"].eq(0).all()
    assert fired["revived"].gt(0).all()
    assert revived.resampled >= 3


def test_inputs_are_drawn_by_their_squared_error(trainer_with, batches) -> None:
    """Rows that are rebuilt exactly are never drawn; of the others, each in proportion."""
    callback = Resample(every=1000)
    trainer = trainer_with(callback)
    for batch in batches(5):
        trainer.train_on(batch)
    error = torch.zeros(BATCH, D)
    error[5], error[9] = 3.0, 1.0  # squared errors 9 : 1
    counts = {5: 0, 9: 0}
    x = torch.randn(BATCH, D)
    for _ in range(400):
        trainer.step = SimpleNamespace(x=x, target=x, error=error, code=trainer.step.code)
        callback.usage.average = torch.ones(F)
        callback.usage.average[0] = 0.0
        callback.usage.steps = torch.full((F,), 1e6)
        (dead,) = callback.resample(trainer).tolist()
        unit = torch.nn.functional.normalize(x - trainer.sae.b_dec, dim=1)
        counts[int((unit @ trainer.sae.W_dec[dead]).argmax())] += 1
    assert set(counts) == {5, 9}
    assert 330 < counts[5] < 390  # 360 expected, standard deviation 6


def test_the_same_seed_draws_the_same_and_state_survives(trainer_with, batches) -> None:
    first, second = Resample(every=7, below=1e-4), Resample(every=7, below=1e-4)
    a, b = trainer_with(first), trainer_with(second)
    for batch in batches(10):
        a.train_on(batch)
    tensors, values = state_of(a)
    restore(b, a.number, {k: v.clone() for k, v in tensors.items()}, values)
    for batch in batches(15, seed=2):
        a.train_on(batch)
    for batch in batches(15, seed=2):
        b.train_on(batch)
    for x, y in zip(a.sae.parameters(), b.sae.parameters(), strict=True):
        assert torch.equal(x, y)
    assert first.resampled == second.resampled


@pytest.mark.parametrize("until", [0.05, 0.5])
def test_it_stops_after_its_share_of_the_run(trainer_with, batches, until: float) -> None:
    callback = Resample(every=10, until=until, below=1e-4)
    trainer = trainer_with(callback)
    for batch in batches(20):
        trainer.train_on(batch)
    assert (callback.resampled > 0) == (until >= 0.1)


def test_a_latent_whose_row_is_fixed_is_left_alone(trainer_with, batches) -> None:
    class Held(TopK):
        fixed_latents = torch.tensor([DEAD[1]])

    sae = Held(D, F, k=4)
    callback = Resample(every=1000, below=1e-4)
    trainer = trainer_with(callback, sae)
    for batch in batches(10):
        trainer.train_on(batch)
    before = sae.W_dec.detach().clone()
    assert sorted(callback.resample(trainer).tolist()) == [DEAD[0], DEAD[2]]
    assert torch.equal(sae.W_dec[DEAD[1]], before[DEAD[1]])


def test_it_resamples_after_the_steps_that_are_named_and_no_others(trainer_with, batches) -> None:
    callback = Resample(at=[7, 14, 28], below=1e-4)
    trainer = trainer_with(callback)
    for batch in batches(30):
        trainer.train_on(batch)
        trainer.sae.shift_pre_activations(torch.zeros(F).index_fill_(0, torch.tensor(DEAD), -1e6))  # dead again
    assert [event["step"] for event in callback.followed.events] == [7, 14, 28]
    assert all(event["revived"] == len(DEAD) for event in callback.followed.events)


def test_a_step_that_never_comes_is_told(trainer_with) -> None:
    callback, said = Resample(at=[50, 7000]), []
    trainer = trainer_with(callback)
    trainer.warn = said.append
    callback.training_started(trainer)
    assert len(said) == 1 and "7,000 will not come" in said[0] and "100 steps" in said[0] and "50," not in said[0]


@pytest.mark.parametrize(
    ("options", "words"), [({"at": [5], "every": 3}, "Leave one of the two out"), ({"at": [5, 5]}, "must rise")]
)
def test_steps_that_contradict_are_refused(options: dict, words: str) -> None:
    with pytest.raises(OptionError, match=words) as error:
        Resample(**options)
    assert error.value.option == "at"
