"""The training step equals a plain torch implementation written here, in float64; losses equal their dense formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit import SparseAutoencoder, Step
from saekit.activations.batch import Activations
from saekit.config import TrainingConfig
from saekit.errors import PluginError, RunError
from saekit.listeners import Listener, Listeners
from saekit.plugins import Registry
from saekit.registered import RegisteredComponent
from saekit.schedules import Linear
from saekit.training.firing import FiringStatistics
from saekit.training.loss_terms import Term
from saekit.training.state import state_of
from saekit.training.trainer import Trainer

D, F, K, BATCH, STEPS = 6, 20, 3, 16, 20
REGISTRY = Registry(disabled=["revival"])


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def build(kind: str, name: str, *args: Any, **options: Any) -> Any:
    component = REGISTRY.find(kind, name)
    return component.build(component.validate(options, name), *args)


def new_sae(architecture: str = "topk", seed: int = 0, **options: Any) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    sae = build("architecture", architecture, D, F, **options)
    sae.initialise(generator, torch.randn(50, D, generator=generator))
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(F, generator=generator) * 0.1)
    return sae


def term(name: str, weight: Any = 1.0, **options: Any) -> Term:
    component = REGISTRY.find("loss", name)
    return Term(name, component.build(component.validate(options, name)), weight, component)


def own_term(label: str, function: Any, weight: Any = 1.0) -> Term:
    origin = {"kind": "loss", "plugin": "test", "distribution": "test", "version": "1", "registry": REGISTRY}
    return Term(label, function, weight, RegisteredComponent(label, "test:x", **origin))


def new_trainer(sae: SparseAutoencoder, terms: list[Term], *, scale: float = 1.0, **training: Any) -> Trainer:
    config = TrainingConfig(tokens=BATCH * STEPS, batch_size=BATCH, **training)
    return Trainer(
        sae, terms, config, total_steps=STEPS, scale=scale, device=torch.device("cpu"), listeners=Listeners()
    )


def batches(n: int = STEPS, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, D, generator=generator) * 3 + 0.5 for _ in range(n)]


def dense_topk(parameters: dict[str, Tensor], x: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    """(code, reconstruction) of a topk SAE, everything dense."""
    pre = (x - parameters["b_dec"]) @ parameters["W_enc"] + parameters["b_enc"]
    kept = torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
    code = pre.relu() * kept
    return code, code @ parameters["W_dec"] + parameters["b_dec"]


def cosine(step: int, lr: float, warmup: int) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - 1 - warmup)))


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
def test_twenty_steps_equal_plain_torch(clip: float, decoder_norm: str) -> None:
    """topk with mse: the gradient of the dense code, its part along unit decoder rows removed, clipped, through Adam."""
    sae = new_sae(k=K, decoder_norm=decoder_norm)
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in sae.named_parameters()}
    trainer = new_trainer(
        sae, [term("mse", 2.0)], scale=1.7, clip=clip, lr={"schedule": "cosine", "to": 1e-2, "warmup": 4}, betas=(0.8, 0.99)
    )
    optimizer = torch.optim.Adam(parameters.values(), lr=1.0, betas=(0.8, 0.99), foreach=False, fused=False)
    clipped = 0
    for number, x in enumerate(batches()):
        trainer.train_on(Activations(x))
        _, rebuilt = dense_topk(parameters, x * 1.7)
        loss = 2.0 * (x * 1.7 - rebuilt).square().mean()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            W = parameters["W_dec"]
            if decoder_norm == "unit":
                W.grad -= (W.grad * W).sum(1, keepdim=True) * W
            norm = torch.cat([p.grad.flatten() for p in parameters.values()]).norm()
            if clip and norm > clip:
                clipped += 1
                for p in parameters.values():
                    p.grad *= clip / (norm + 1e-6)
            optimizer.param_groups[0]["lr"] = cosine(number, 1e-2, 4)
            optimizer.step()
            if decoder_norm == "unit":
                W /= W.norm(dim=1, keepdim=True)
        torch.testing.assert_close(trainer.losses["loss"], loss.detach(), rtol=1e-9, atol=1e-12)
        if clip:
            torch.testing.assert_close(trainer.grad_norm, norm, rtol=1e-9, atol=1e-12)
        for name, p in sae.named_parameters():
            torch.testing.assert_close(p.detach(), parameters[name].detach(), rtol=0, atol=1e-9, msg=f"{name} at {number}")
    assert clipped == (STEPS if clip == 0.05 else 0)
    assert trainer.tokens == BATCH * STEPS


def test_weights_are_schedules_and_a_zero_weight_skips_the_loss() -> None:
    calls = []
    rise = Linear(schedule="linear", to=1.0, steps=4, begin=5)

    def heavy(step: Step) -> Tensor:
        calls.append(step.number)
        return step.error.abs().mean()

    trainer = new_trainer(new_sae(k=K), [term("mse"), own_term("heavy", heavy, rise)])
    for x in batches(12):
        trainer.train_on(Activations(x))
        terms = [(t.weight_at(trainer.number - 1, STEPS), t.label) for t in trainer.terms]
        total = sum(weight * trainer.losses[label] for weight, label in terms if label in trainer.losses)
        torch.testing.assert_close(trainer.losses["loss"], total)
    assert calls == list(range(6, 12))


# --- the built-in losses against dense formulas ------------------------------------------------------------------


def step_of(sae: SparseAutoencoder, x: Tensor, dead: Tensor | None = None) -> Step:
    code = sae.encode(x)
    n_dead = 0 if dead is None else int(dead.sum())
    return Step(x=x, target=x, code=code, reconstruction=sae.decode(code), sae=sae, dead=dead, n_dead=n_dead)


def gradients(value: Tensor, sae: SparseAutoencoder) -> dict[str, Tensor]:
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


@pytest.mark.parametrize("n_dead", [1, 2, 9])
@pytest.mark.parametrize("k", [None, 1, 4])
def test_auxk_equals_its_dense_formula(n_dead: int, k: int | None) -> None:
    """The top k dead latents rebuild the detached residual without the bias, in units of the residual's variance."""
    sae, x = new_sae(k=K), batches(1)[0]
    dead = torch.zeros(F, dtype=torch.bool)
    dead[torch.randperm(F, generator=torch.Generator().manual_seed(3))[:n_dead]] = True
    loss = build("loss", "auxk", **({} if k is None else {"k": k}))
    step = step_of(sae, x, dead)
    assert loss.active(step)
    value = loss(step)

    parameters = dict(sae.named_parameters())
    _, rebuilt = dense_topk(parameters, x)
    residual = (x - rebuilt).detach()
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc)[:, dead]
    used = min(k or D // 2, n_dead)
    kept = torch.zeros_like(pre).scatter(1, pre.topk(used, dim=1).indices, 1.0)
    error_hat = (pre.relu() * kept) @ sae.W_dec[dead]
    variance = (residual - residual.mean(0)).square().mean()
    reference = (residual - error_hat).square().mean() / variance

    torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(value, sae), gradients(reference, sae)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-12, msg=name)
    assert float(theirs["W_enc"][:, ~dead].abs().sum()) == 0.0  # nothing reaches a living latent's encoder
    assert float(theirs["W_dec"].abs().sum()) > 0


def test_auxk_is_silent_while_nothing_is_dead() -> None:
    trainer = new_trainer(new_sae(k=K), [term("mse"), term("auxk")], dead_after=BATCH * 8, guard_steps=12)
    with torch.no_grad():
        trainer.sae.W_enc[:, :5] *= 1e-3  # five latents that are never among the largest
        trainer.sae.b_enc[:5] = 0.0
    spoke = []
    for x in batches():
        trainer.train_on(Activations(x))
        spoke.append("auxk" in trainer.losses)
    # Counted after every tenth step: silent for 8 batches or more from step 9 on, so the first to hear of it is step 10.
    assert spoke == [False] * 10 + [True] * 10
    assert trainer.listeners.warnings == []


@pytest.mark.parametrize("architecture", ["topk", "standard"])
@pytest.mark.parametrize("by_decoder_norm", [False, True])
def test_l1_equals_its_dense_formula(architecture: str, by_decoder_norm: bool) -> None:
    options = {"k": K} if architecture == "topk" else {}
    sae, x = new_sae(architecture, decoder_norm="free", **options), batches(1)[0]
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(F, 1) + 0.5)
    value = term("l1", by_decoder_norm=by_decoder_norm).value(step_of(sae, x))
    parameters = dict(sae.named_parameters())
    code, _ = dense_topk(parameters, x, K if architecture == "topk" else F)
    reference = (code * (sae.W_dec.norm(dim=1) if by_decoder_norm else 1.0)).sum(1).mean()
    torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(value, sae), gradients(reference, sae)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-12, msg=name)
    assert bool(theirs["W_dec"].any()) is by_decoder_norm


# --- metrics against plain formulas ------------------------------------------------------------------------------


def test_metrics_equal_plain_formulas_over_batches_of_any_size() -> None:
    sae = new_sae(k=K)
    with torch.no_grad():
        sae.b_enc[:4] = -1e3
    x = torch.cat(batches(5))[:73]
    with torch.no_grad():
        code, rebuilt = dense_topk(dict(sae.named_parameters()), x)
    metrics = {name: build("metric", name) for name in ("explained_variance", "l0", "density", "dead")}
    with torch.no_grad():
        for part in x.split([1, 30, 42]):
            for metric in metrics.values():
                metric.update(step_of(sae, part))
    values = {key: value for metric in metrics.values() for key, value in metric.compute().items()}
    fvu = float((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum())
    density = (code != 0).double().mean(0)
    expected = {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "mse": float((x - rebuilt).square().mean()),
        "l0": float((code != 0).sum(1).double().mean()),
        "dense_fraction": float((density > 0.1).double().mean()),
        "density_median": float(density.median()),
        "dead_latents": float((density == 0).sum()),
        "dead_fraction": float((density == 0).double().mean()),
    }
    assert values == pytest.approx(expected, rel=1e-9)
    assert expected["dead_latents"] >= 4


def test_explained_variance_of_what_does_not_vary_is_not_defined() -> None:
    sae, x = new_sae(k=K), torch.zeros(8, D)
    metric = build("metric", "explained_variance")
    metric.update(step_of(sae, x))
    assert metric.compute()["explained_variance"] is None


def test_what_is_logged_of_a_step_equals_plain_formulas() -> None:
    trainer = new_trainer(new_sae(k=K), [term("mse"), term("l1", 0.1)], lr=1e-2, scale=2.0)
    x = batches(1)[0]
    before = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
    trainer.train_on(Activations(x))
    code, rebuilt = dense_topk(before, x * 2)
    values = trainer.measures()
    error, target = (x * 2 - rebuilt).square(), x * 2
    assert values["loss/mse"] == pytest.approx(float(error.mean()))
    assert values["loss/l1"] == pytest.approx(float(code.sum(1).mean()))
    assert values["loss"] == pytest.approx(values["loss/mse"] + 0.1 * values["loss/l1"])
    assert values["explained_variance"] == pytest.approx(1 - float(error.sum() / (target - target.mean(0)).square().sum()))
    assert values["l0"] == pytest.approx(float((code > 0).sum(1).double().mean()))
    assert (values["weight/l1"], values["lr"], values["tokens"]) == (0.1, 1e-2, BATCH)


# --- firing statistics -------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    fired=st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=40),
    dead_after=st.integers(1, 60),
    rows=st.integers(1, 9),
    check_every=st.integers(1, 7),
)
def test_a_latent_is_dead_when_it_was_silent_long_enough(
    fired: list[list[int]], dead_after: int, rows: int, check_every: int
) -> None:
    firing = FiringStatistics(4, dead_after, torch.device("cpu"), check_every=check_every)
    silent, dead = [0] * 4, [False] * 4
    for number, counts in enumerate(fired):
        firing.update(torch.tensor(counts), rows, number)
        silent = [0 if count else s + rows for count, s in zip(counts, silent, strict=True)]
        if (number + 1) % check_every == 0:
            dead = [s >= dead_after for s in silent]
        assert firing.silent.tolist() == silent
        assert firing.dead.tolist() == dead
        assert firing.n_dead == sum(dead)
    again = FiringStatistics(4, dead_after, torch.device("cpu"), check_every=check_every)
    again.load_state_dict({name: tensor.clone() for name, tensor in firing.state_dict().items()})
    assert (again.silent.tolist(), again.dead.tolist(), again.n_dead) == (silent, dead, sum(dead))


def test_a_revived_latent_counts_as_living_at_once() -> None:
    firing = FiringStatistics(4, 2, torch.device("cpu"), check_every=1)
    for number in range(3):
        firing.update(torch.tensor([1, 0, 0, 0]), 1, number)
    assert firing.n_dead == 3
    firing.revive(torch.tensor([1, 3]))
    assert firing.dead.tolist() == [False, False, True, False]
    assert (firing.n_dead, firing.silent.tolist()) == (1, [0, 0, 3, 0])


def test_the_trainer_counts_what_fired() -> None:
    trainer = new_trainer(new_sae(k=K), [term("mse")])
    for x in batches(3):
        parameters = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
        trainer.train_on(Activations(x))
        code, _ = dense_topk(parameters, x)
        assert trainer.fired.tolist() == (code > 0).sum(0).tolist()


# --- the gradient guard, and numbers that are not finite ---------------------------------------------------------


class Unreached(torch.nn.Module):
    """Has a parameter that it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.forgotten = torch.nn.Parameter(torch.ones(D)), torch.nn.Parameter(torch.ones(3))

    def __call__(self, step: Step) -> Tensor:
        return (step.reconstruction * self.used).square().mean()


def trained(terms: list[Term], **training: Any) -> Trainer:
    trainer = new_trainer(new_sae(k=K), terms, **{"guard_steps": 5, **training})
    for x in batches(8):
        trainer.train_on(Activations(x))
    return trainer


def test_a_run_without_fault_has_no_finding() -> None:
    trainer = trained([term("mse"), term("l1"), term("auxk")])
    assert trainer.listeners.warnings == []
    assert trainer.guard is None


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda step: torch.tensor(3.0), ("Loss 'odd'", "no gradient to any parameter")),
        (lambda step: step.error.detach().square().mean(), ("Loss 'odd'", "no gradient to any parameter")),
        (lambda step: (step.code.sum() * 0.0).sum(), ("Loss 'odd'", "no gradient to any parameter")),
        (Unreached(), ("'loss.odd.forgotten'", "No gradient has reached")),
    ],
)
def test_what_teaches_nothing_is_named_once(function: Any, words: tuple[str, ...]) -> None:
    trainer = trained([term("mse"), own_term("odd", function)])
    (finding,) = trainer.listeners.warnings
    for word in words:
        assert word in finding


def test_a_run_whose_only_loss_teaches_nothing_is_told_so() -> None:
    trainer = trained([own_term("constant", lambda step: torch.tensor(1.0))])
    assert any("'constant'" in w for w in trainer.listeners.warnings)
    assert any("'W_enc'" in w for w in trainer.listeners.warnings)


def test_a_frozen_part_of_the_sae_is_named() -> None:
    trainer = trained([own_term("half", lambda step: step.code.sum().mean())], clip=0)
    assert [w for w in trainer.listeners.warnings if "'W_dec'" in w]
    assert not [w for w in trainer.listeners.warnings if "'W_enc'" in w]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_by_name(bad: float) -> None:
    def odd(step: Step) -> Tensor:
        return step.error.mean() * (bad if step.number == 3 else 1.0)

    with pytest.raises(RunError, match=r"loss 'odd' is -?(nan|inf) at step 3\..*smaller weight of 'odd'"):
        trained([term("mse"), own_term("odd", odd)])


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_are_lost() -> None:
    def root(step: Step) -> Tensor:
        return (step.error - step.error.detach()).square().sum().sqrt()  # 0, with an infinite slope

    trainer = new_trainer(new_sae(k=K), [term("mse"), own_term("root", root)])
    with pytest.raises(RunError, match=r"gradient is not finite at step 0.*root = 0"):
        trainer.train_on(Activations(batches(1)[0]))
    assert all(bool(p.isfinite().all()) for p in trainer.sae.parameters())


def test_weights_that_are_not_finite_are_not_saved() -> None:
    def root(step: Step) -> Tensor:
        return (step.error - step.error.detach()).square().sum().sqrt()

    trainer = new_trainer(new_sae(k=K), [own_term("root", root)], clip=0)  # unclipped, nobody looks at the gradient
    trainer.train_on(Activations(batches(1)[0]))
    with pytest.raises(RunError, match="not finite after step 0, so it is not saved"):
        state_of(trainer)


@pytest.mark.parametrize("value", [None, 3.0, torch.ones(2), "1.0"])
def test_a_loss_returns_one_number(value: Any) -> None:
    with pytest.raises(PluginError, match=r"loss 'odd' of plugin 'test' \(test 1\) returned"):
        trained([own_term("odd", lambda step: value)])


def test_a_loss_that_raises_is_named_with_its_step() -> None:
    def odd(step: Step) -> Tensor:
        if step.number == 2:
            raise KeyError("missing")
        return step.error.square().mean()

    with pytest.raises(PluginError, match=r"loss 'odd' of plugin 'test' \(test 1\) failed at step 2: KeyError: 'missing'"):
        trained([own_term("odd", odd)])


@pytest.mark.parametrize("guard_steps", [1, 5])
def test_a_backward_pass_that_raises_is_the_losses_failure(guard_steps: int) -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.ones(7)

    def odd(step: Step) -> Tensor:
        return Bad.apply(step.error) if step.number >= 2 else step.error.square().mean()

    with pytest.raises(PluginError, match="backward pass of loss 'odd'"):
        trained([own_term("odd", odd)], guard_steps=guard_steps)


# --- what losses and callbacks say of a step -----------------------------------------------------------------------------


class Speaks:
    """A loss or a callback that says what it is told to, and counts how often it is asked."""

    def __init__(self, said: Any, active: bool = True) -> None:
        self.said, self.asked, self._active = said, [], active

    def __call__(self, step: Step) -> Tensor:
        return step.error.square().mean()

    def active(self, step: Step) -> bool:
        return self._active

    def measures(self, about: Any) -> Any:
        self.asked.append(about)
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


def test_measures_of_losses_and_callbacks_join_the_log_and_are_asked_for_only_then() -> None:
    loss, silent = Speaks({"a": torch.tensor(2.0), "b": True}), Speaks({"a": 1.0}, active=False)
    callback, tracker = Speaks({"edges": 7}), Speaks({"no": 1})
    trainer = new_trainer(new_sae(k=K), [own_term("mine", loss), own_term("silent", silent)])
    trainer.listeners.add(Listener("callback.graph", callback, "a callback", vital=True))
    trainer.listeners.add(Listener("tracker.of", tracker, "a tracker", vital=False))
    for x in batches(3):
        trainer.train_on(Activations(x))
    assert loss.asked == []
    said = {
        name: value
        for name, value in trainer.measures().items()
        if name.split("/")[0] in ("mine", "silent", "graph", "of")
    }
    assert said == {"mine/a": 2.0, "mine/b": 1.0, "graph/edges": 7.0}
    assert loss.asked == [trainer.step] and callback.asked == [trainer]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (3.0, "measures returned float; it returns numbers by name"),
        ({"rows": torch.ones(4)}, r"'rows' of shape \[4\]"),
        ({"word": "much"}, "'word' as str"),
        ({3: 1.0}, "the name 3"),
        (ValueError("no sequences"), "failed in measures: ValueError: no sequences"),
    ],
)
def test_measures_that_are_no_scalars_are_refused_with_their_author(said: Any, message: str) -> None:
    trainer = new_trainer(new_sae(k=K), [own_term("mine", Speaks(said))])
    trainer.train_on(Activations(batches(1)[0]))
    with pytest.raises(PluginError, match=message) as error:
        trainer.measures()
    assert "test" in str(error.value)


def test_a_measure_that_is_not_finite_is_left_out_with_a_warning_and_two_of_one_name_are_refused() -> None:
    trainer = new_trainer(new_sae(k=K), [own_term("mine", Speaks({"a": math.nan, "b": 1}))])
    trainer.train_on(Activations(batches(1)[0]))
    assert "mine/a" not in trainer.measures() and trainer.measures()["mine/b"] == 1.0
    assert [w for w in trainer.listeners.warnings if "mine/a is not finite" in w]
    trainer.listeners.add(Listener("callback.mine", Speaks({"b": 2}), "a callback", vital=True))
    with pytest.raises(PluginError, match="both log 'mine/b'"):
        trainer.measures()


def test_asking_for_measures_moves_no_random_numbers() -> None:
    class Draws(Speaks):
        def measures(self, about: Any) -> Any:
            return {"drawn": torch.rand(())}

    trainer = new_trainer(new_sae(k=K), [own_term("mine", Draws(None))])
    trainer.train_on(Activations(batches(1)[0]))
    before = torch.get_rng_state()
    trainer.measures()
    assert torch.equal(torch.get_rng_state(), before)
