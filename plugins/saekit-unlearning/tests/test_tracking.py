"""The callbacks `groups`, `importance`, `prune` and `stability`, and the loss `feature_contrast`, on planted data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from saekit_graph.clusters import Pairs, correlated_pairs
from saekit_revival.resample import Resample
from saekit_unlearning.feature_contrast import FeatureContrast
from saekit_unlearning.groups import Groups, grouped
from saekit_unlearning.importance import LEVELS, Importance, gradient_importance, levels_by_label, mutual_information
from saekit_unlearning.prune import Prune
from saekit_unlearning.stability import Stability, overlap, spearman
from sklearn.metrics import adjusted_rand_score, mutual_info_score

from saekit import OptionError, Pattern, RunContext, SparseCode, Step, hookimpl
from saekit.activations.batch import Activations
from saekit.builtin.architectures.topk import TopK
from saekit.builtin.losses import AuxK, mse
from saekit.config import TrainingConfig
from saekit.errors import Interrupted
from saekit.listeners import Listener, Listeners
from saekit.plugins import Registry
from saekit.run_directory import RunDirectory
from saekit.runner.plan import plan_run
from saekit.runner.run import Run
from saekit.testing import make_step, tiny_run
from saekit.training.loss_terms import Term
from saekit.training.trainer import Trainer

F, BLOCKS, SIZE, BATCH = 64, 6, 6, 256
BLOCK = torch.where(torch.arange(F) < BLOCKS * SIZE, torch.arange(F) // SIZE, -1)  # the planted block of each latent
DIRECTIONS = torch.linalg.qr(torch.randn(F, F, generator=torch.Generator().manual_seed(7)))[0]


def planted_code(n: int, draws: torch.Generator) -> torch.Tensor:
    """[n, F]: blocks of latents that fire together, and others that fire alone."""
    on = torch.rand(n, BLOCKS, generator=draws) < 0.15
    strength = 1 + torch.rand(n, BLOCKS, generator=draws)
    together = (on * strength).repeat_interleave(SIZE, 1) * (torch.rand(n, BLOCKS * SIZE, generator=draws) < 0.9)
    alone = torch.rand(n, F - BLOCKS * SIZE, generator=draws)
    return torch.cat([together, alone * (torch.rand(alone.shape, generator=draws) < 0.1)], 1)


def batches(n: int, seed: int = 1, noise: float = 0.0, present: int = F, labels: bool = False) -> Iterator[Activations]:
    """Batches of planted codes times the directions. present: only these features occur. labels: whether block 0 is active."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(n):
        code = planted_code(BATCH, draws)
        code[:, present:] = 0.0
        x = code @ DIRECTIONS + noise * torch.randn(BATCH, F, generator=draws)
        yield Activations(x, labels=(code[:, :SIZE] > 0).any(1, keepdim=True).float() if labels else None)


def trainer_with(*callbacks: Any, losses: tuple[Any, ...] = (mse,), lr: float = 1e-9, steps: int = 200) -> Trainer:
    """A trainer whose latents are the planted directions."""
    sae = TopK(F, F, k=32)
    with torch.no_grad():
        sae.W_dec.copy_(DIRECTIONS)
        sae.W_enc.copy_(DIRECTIONS.t())
        sae.b_dec.zero_()
    listeners = Listeners()
    for callback in callbacks:
        name = type(callback).__name__.lower()
        listeners.add(Listener(f"callback.{name}", callback, f"callback {name!r}", vital=True))
    config = TrainingConfig(tokens=BATCH * steps, batch_size=BATCH, lr=lr, dead_after=4 * BATCH)
    terms = [Term(f"loss{i}", loss, 1.0, SimpleNamespace(origin="a loss")) for i, loss in enumerate(losses)]
    return Trainer(sae, terms, config, total_steps=steps, scale=1.0, device=torch.device("cpu"), listeners=listeners)


# --- groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [75.0, 85.0])
def test_groups_are_the_planted_blocks(percentile: float) -> None:
    callback = Groups(every=8, percentile=percentile)
    trainer = trainer_with(callback)
    for batch in batches(16):
        trainer.train_on(batch)
    groups = trainer.provided["groups"]
    alone = torch.arange(F) + F  # whoever is in no group is one of its own
    planted, found = (torch.where(g >= 0, g, alone) for g in (BLOCK, groups))
    assert adjusted_rand_score(planted, found) >= 0.9
    assert [row["step"] for row in callback.history] == [8, 16]
    assert callback.history[1]["agreement"] >= 0.9
    result = callback.result()
    assert {row["latent"] for row in result.tables["members"]} == set((groups >= 0).nonzero().squeeze(1).tolist())
    assert result.scalars["threshold"] == pytest.approx(callback.measures(trainer)["threshold"])


def test_pairs_are_those_that_fire_together_with_numpys_correlation() -> None:
    code = planted_code(500, torch.Generator().manual_seed(3)).double()
    sparse = SparseCode(Pattern.of_mask(code != 0), code[code != 0])
    pairs = correlated_pairs(iter([sparse]), F, least=2)
    r = np.corrcoef(code.numpy().T)
    np.testing.assert_allclose(pairs.weight, r[pairs.first, pairs.second], atol=1e-6)
    together = ((code != 0).double().t() @ (code != 0).double()).triu(1) > 0
    assert set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == set(map(tuple, together.nonzero().tolist()))
    assert pairs.percentile(75) == pytest.approx(float(np.percentile(r[pairs.first, pairs.second], 75)), abs=1e-6)


def test_the_window_is_cut_to_the_pairs_that_it_may_cost() -> None:
    code = torch.ones(40, 8)
    sparse = SparseCode(Pattern.of_mask(code != 0), torch.rand(320))
    assert correlated_pairs(iter([sparse]), 8, least=1, visits=28 * 10).tokens == 10


def test_groups_are_joined_into_clusters_and_the_large_component_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, size = 8, 5
    n = blocks * size
    first, second = np.triu_indices(n, 1)
    weight = np.where(first // size == second // size, 0.9, np.where(first // 20 == second // 20, 0.4, 0.1)).astype(np.float32)
    pairs = Pairs(first.astype(np.int32), second.astype(np.int32), weight, n, 10_000)
    found = grouped(pairs, percentile=60, minimum=5, clusters=2)
    assert found.threshold == pytest.approx(0.4)
    assert adjusted_rand_score(found.group, np.arange(n) // size) == 1.0
    assert set(found.cluster) == {0, 1}  # nothing above 0.4 says which groups belong together
    joined = grouped(pairs, percentile=30, minimum=5, clusters=2)
    assert adjusted_rand_score(joined.cluster, np.arange(n) // 20) == 1.0
    monkeypatch.setattr("saekit_unlearning.groups.LARGEST", 10)
    cut = grouped(pairs, percentile=0, minimum=5)  # all are connected at 0.1
    assert (cut.threshold, cut.applied) == (pytest.approx(0.1), pytest.approx(0.4))
    assert adjusted_rand_score(cut.group, np.arange(n) // size) == 1.0


def test_without_groups_it_says_so() -> None:
    assert len(correlated_pairs(iter([]), F)) == 0
    callback = Groups(every=2, minimum=40)
    trainer = trainer_with(callback)
    for batch in batches(2):
        trainer.train_on(batch)
    assert trainer.provided["groups"].eq(-1).all()
    assert "there is no group" in callback.result().notes[0]
    assert any("groups: no 40 latents" in warning for warning in trainer.listeners.warnings)


# --- feature_contrast ----------------------------------------------------------------------------------------------


def test_its_value_and_gradient_are_those_of_the_formula() -> None:
    step = make_step(batch=200, options={"k": 24}, provided=("groups",), dtype=torch.float64)
    loss = FeatureContrast(separation=0.7, diversity=0.3, groups=99, members=99)
    assert loss.active(step)
    parameters = [step.sae.W_enc, step.sae.b_enc, step.sae.W_dec]
    value = loss(step)
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)

    group, f, W = step.provided["groups"], step.code.dense(), step.sae.W_dec
    r = torch.corrcoef(f.t().index_select(0, (group >= 0).nonzero().squeeze(1)))
    rows = W[group >= 0] / W[group >= 0].norm(dim=1, keepdim=True)
    c = rows @ rows.t()
    g = group[group >= 0]
    pull, apart, alike = [], [], []
    for i in range(len(g)):
        for j in range(len(g)):
            if i != j and torch.isfinite(r[i, j]):
                if g[i] == g[j]:
                    pull.append(1 - r[i, j])
                    alike.append(c[i, j].clamp_min(0) ** 2)
                else:
                    apart.append(r[i, j] ** 2)
    written = sum(pull) / len(pull) + 0.7 * sum(apart) / len(apart) + 0.3 * sum(alike) / len(alike)
    torch.testing.assert_close(value, written)
    for one, other in zip(found, torch.autograd.grad(written, parameters, allow_unused=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_it_is_inactive_without_groups_and_takes_only_so_many_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = FeatureContrast(groups=2, members=3)
    assert not loss.active(make_step())
    step = make_step(provided=("groups",))
    none = make_step()
    none.provided = {"groups": torch.full((64,), -1)}
    assert not loss.active(none)
    asked: list[int] = []
    columns = SparseCode.columns
    monkeypatch.setattr(SparseCode, "columns", lambda self, latents: asked.append(len(latents)) or columns(self, latents))
    monkeypatch.setattr(SparseCode, "dense", None)
    assert loss.active(step)
    loss(step)
    assert asked == [6]


# --- importance ----------------------------------------------------------------------------------------------------

PLANTED = torch.tensor([1, 3, 8, 14, 20, 26, 30, 33])


def of_planted(step: Step) -> torch.Tensor:
    """Depends on the planted latents alone."""
    return step.code.columns(PLANTED).square().mean()


def test_gradient_importance_is_activation_times_gradient_summed_over_the_batch() -> None:
    step = make_step(batch=50, options={"k": 6}, dtype=torch.float64)
    step.sae.b_enc.data.uniform_(-0.1, 0.1)
    step = Step.of(step.sae, Activations(step.x))
    loss = step.error.square().mean()
    (slope,) = torch.autograd.grad(loss, step.code.values, retain_graph=True)
    loss.backward()
    written = torch.zeros(64, dtype=torch.float64).index_add(0, step.code.pattern.indices, step.code.values.detach() * slope)
    torch.testing.assert_close(gradient_importance(step.sae), written.abs())


def test_importance_ranks_the_planted_latents_first() -> None:
    callback = Importance(every=10)
    trainer = trainer_with(callback, losses=(of_planted,))
    for batch in batches(20):
        trainer.train_on(batch)
    ranked = [row["latent"] for row in callback.result().tables["latents"]]
    assert set(ranked[: len(PLANTED)]) == set(PLANTED.tolist())
    assert float(trainer.provided["importance"].max()) <= 1.0
    assert callback.result().scalars["threshold"] == pytest.approx(0.01)


def test_the_mutual_information_finds_the_latents_that_tell_the_label() -> None:
    callback = Importance(every=5, activation=0, gradient=0, information=1, label="block")
    context: Any = SimpleNamespace(source=SimpleNamespace(concepts=["block"]))
    callback.prepare(context)
    trainer = trainer_with(callback)
    for batch in batches(10, labels=True):
        trainer.train_on(batch)
    assert set(trainer.provided["importance"].topk(SIZE).indices.tolist()) == set(range(SIZE))
    with pytest.raises(OptionError, match="no label 'forget'. It has: block"):
        Importance(information=0.15).prepare(context)


@pytest.mark.parametrize("sparse", [True, False])
def test_the_mutual_information_is_scikit_learns_on_discretised_codes(sparse: bool) -> None:
    step = make_step(batch=400, options={"k": 10}, sparse=sparse)
    label = torch.randint(0, 3, (400,), generator=torch.Generator().manual_seed(1)).float()
    label[label == 2] = torch.nan
    f = step.code.dense().detach()
    rms = (f.square().sum(0) / (f != 0).sum(0).clamp_min(1)).sqrt()
    found = mutual_information(levels_by_label(step.code, label, rms))
    known = ~label.isnan()
    levels = ((f > 0).long() + (f > rms).long())[known].numpy()
    assert set(np.unique(levels)) == set(range(LEVELS))
    expected = [mutual_info_score(label[known].numpy(), levels[:, j]) for j in range(f.shape[1])]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_the_adaptive_threshold_is_a_percentile_of_the_living() -> None:
    callback = Importance(every=5, percentile=30)
    trainer = trainer_with(callback)
    trainer.retire(torch.arange(10))
    for batch in batches(5):
        trainer.train_on(batch)
    importance = trainer.provided["importance"]
    assert importance[:10].eq(0).all()
    wanted = float(np.percentile(importance[10:].numpy(), 30))
    assert float(trainer.provided["importance_threshold"]) == pytest.approx(wanted, rel=1e-5)


# --- prune ---------------------------------------------------------------------------------------------------------


class Watch:
    """Counts how often retired latents fire."""

    def __init__(self) -> None:
        self.fired, self.before = 0, torch.zeros(F, dtype=torch.bool)

    @hookimpl
    def step_ended(self, trainer: Trainer) -> None:
        self.fired += int(trainer.fired[self.before].sum())
        assert bool(trainer.firing.retired[self.before].all())
        assert not bool((trainer.firing.dead & trainer.firing.retired).any())
        self.before = trainer.firing.retired.clone()


def test_pruning_spares_the_planted_latents_and_the_retired_stay_retired() -> None:
    """With auxk and resample at work, which would otherwise revive whatever is silent."""
    watch, pruning, resample = Watch(), Prune(every=10, start=20, share=0.1, keep=0.3, until=1.0), Resample(every=15, below=1e-3)
    callbacks = (watch, Importance(every=10, percentile=60), pruning, resample)
    trainer = trainer_with(*callbacks, losses=(mse, AuxK()), lr=1e-4, steps=120)
    trainer.sae.b_enc.data[56:] = -1e6  # silent from the start
    for batch in batches(120, noise=0.02, present=12):
        trainer.train_on(batch)
    retired = trainer.firing.retired
    assert 30 <= int(retired.sum()) <= F - 12
    assert not retired[:12].any()
    assert watch.fired == 0
    assert resample.resampled >= 8
    assert trainer.sae.W_enc[:, retired].eq(0).all() and trainer.sae.b_enc[retired].eq(0).all()
    assert trainer.measures()["retired"] == int(retired.sum())
    rows = pruning.result().tables["retired"]
    assert {row["latent"] for row in rows} == set(retired.nonzero().squeeze(1).tolist())
    shares = [row["pruned"] / (row["living"] + row["pruned"]) for row in pruning.history]
    assert max(shares) <= 0.1


def test_the_curriculum_grows_and_fixed_latents_stay() -> None:
    class Held(TopK):
        fixed_latents = torch.tensor([50, 51])

    callback = Prune(share=0.1, curriculum=True)
    assert [callback.share_at(n, 100) for n in (0, 50, 100)] == pytest.approx([0.0, 0.05, 0.1])
    trainer = trainer_with(callback)
    trainer.sae.__class__ = Held
    trainer.provided |= {"importance": torch.zeros(F), "importance_threshold": torch.tensor(0.01)}
    for done in range(100, 200, 4):
        callback.prune(trainer, done)
    assert trainer.firing.n_retired == F // 2
    assert not trainer.firing.retired[[50, 51]].any()


def test_with_reinitialise_the_least_important_get_new_weights() -> None:
    callback = Prune(share=0.1, reinitialise=True)
    trainer = trainer_with(callback)
    for batch in batches(3, noise=0.1):
        trainer.train_on(batch)
    before = trainer.sae.W_dec.detach().clone()
    trainer.provided |= {"importance": torch.arange(F) / F, "importance_threshold": torch.tensor(1.0)}
    assert callback.prune(trainer, 100).tolist() == list(range(6))
    moved = (trainer.sae.W_dec.detach() - before).norm(dim=1) > 0.1
    assert moved.nonzero().squeeze(1).tolist() == list(range(6))
    assert trainer.firing.n_retired == 0


# --- stability -------------------------------------------------------------------------------------------------------


def test_stability_says_what_survives() -> None:
    a = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert spearman(a, a**3) == pytest.approx(1.0) and spearman(a, -a) == pytest.approx(-1.0)
    assert spearman(a, torch.zeros(100)) is None
    assert overlap(a, a.clone(), 10) == 1.0 and overlap(a, -a, 10) == 0.0
    callback = Stability(every=1, top=8)
    trainer = trainer_with(callback)
    trainer.retire(torch.arange(2))
    importance = torch.arange(F) / F
    trainer.provided["importance"] = importance
    callback.check(trainer, 1)
    trainer.provided["importance"] = importance.roll(4)
    trainer.sae.W_dec.data[2:33] *= -1  # half of the living
    callback.check(trainer, 2)
    found = callback.result().scalars
    assert found["decoder_cosine"] == pytest.approx(0.0, abs=1e-6)
    assert found["top_overlap"] == pytest.approx(6 / 10)  # the second ranking's first two are latents that were last
    assert callback.measures(trainer) == found


# --- in a run --------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Any] = {
    "loss": [{"use": "mse"}, {"use": "auxk"}, {"use": "feature_contrast", "weight": 0.1}],
    "callback": [
        {"use": "groups", "every": 3, "batches": 2, "minimum": 2, "least": 2, "clusters": 3},
        {
            "use": "importance", "every": 2, "percentile": 60, "label": "feature 1",
            "activation": 0.35, "gradient": 0.5, "information": 0.15,
        },
        {"use": "prune", "every": 2, "start": 4, "until": 1.0},
        {"use": "stability", "every": 2},
        {"use": "resample", "every": 3, "below": 0.2},
    ],
}  # fmt: skip


def in_context(context: RunContext) -> Any:
    """An analyzer that answers with what callbacks found."""
    from saekit import Result

    return Result(scalars={"callbacks": len(context.found), "groups": context.found["groups"].scalars["groups"]})


class Stop:
    @hookimpl
    def step_ended(self, number: int) -> None:
        if number == 7:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_at_the_same_bits_and_finds_the_same(tmp_path: Path) -> None:
    whole = tiny_run(tmp_path / "whole", **SECTIONS)
    assert whole.summary["analysis"]["prune"]["retired"] > 0
    assert whole.summary["analysis"]["groups"]["groups"] > 0
    from saekit.testing.tiny import carried_out, tiny_table

    with pytest.raises(Interrupted):
        carried_out({**tiny_table(), **SECTIONS}, tmp_path / "cut", Registry(), Stop())
    with RunDirectory.resume(str(tmp_path / "cut")) as (directory, config):
        Run(plan_run(config, Registry()), directory, Registry()).execute()
    for name in ("sae/sae_weights.safetensors", *(f"analysis/{n}/result.json" for n in ("groups", "prune", "stability"))):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


def test_analyzers_find_what_callbacks_found(tmp_path: Path) -> None:
    from saekit import Component
    from saekit.testing import registry_of

    registry = registry_of(analyzer=Component("ask", in_context, needs=("groups",)))
    run = tiny_run(tmp_path / "run", registry=registry, analyzer=[{"use": "ask"}], **SECTIONS)
    assert run.summary["analysis"]["ask"]["callbacks"] == 5
    assert run.summary["analysis"]["ask"]["groups"] == run.summary["analysis"]["groups"]["groups"]
    assert set(run.context.found) == {"groups", "importance", "prune", "resample", "stability"}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"importance/threshold"' in lines and '"prune/living"' in lines and '"stability/decoder_cosine"' in lines
    assert "Importance of the latents" in (tmp_path / "run" / "report.html").read_text()
