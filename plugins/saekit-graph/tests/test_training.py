"""The loss `cluster` and the callback `refresh_graph`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_graph.cluster import Cluster, cluster_of
from saekit_graph.refresh import RefreshGraph
from torch import Tensor

from saekit import ComponentOption, FeatureGraph, Registry, Step, UsageError, hookimpl
from saekit.testing import make_step, tiny_run

LATENT, OTHERS = 5, [6, 7, 8]  # the graph of make_step is a ring: a latent's neighbours are the next three


def a_step(**changes: Any) -> Step:
    return make_step(**{"sequences": True, "graph": True, "dtype": torch.float64, **changes})


def a_cluster(step: Step, latents: dict[str, int] | None = None, **options: Any) -> Cluster:
    loss = Cluster(latents={"0": LATENT} if latents is None else latents, **options)

    class Source:
        concepts = ("code", "other")

        def sequences(self, *_: Any) -> Any:
            return step.sequences

    class Context:
        sae, seed, source = step.sae, 0, Source()

    loss.prepare(Context())  # type: ignore[arg-type]
    return loss


def pre_activations(step: Step) -> tuple[Tensor, Tensor]:
    """(pre-activations of the cluster [m, 4], each row's label of the first concept [m])."""
    batch = step.sequences
    x = batch.x[batch.mask]
    pre = (x - step.sae.b_dec) @ step.sae.W_enc + step.sae.b_enc
    return pre[:, [LATENT, *OTHERS]], batch.labels[batch.mask.nonzero()[:, 0], 0]


def test_raw_is_the_formula_of_the_seed() -> None:
    step = a_step()
    pre, y = pre_activations(step)
    expected = -(pre[y == 1].mean() - pre[y == 0].mean())
    torch.testing.assert_close(a_cluster(step, form="raw")(step), expected)


def test_the_other_forms_are_of_the_mean_in_units_of_its_rms() -> None:
    step = a_step()
    pre, y = pre_activations(step)
    mean = pre.mean(1)
    mean = mean - 0.5 * (mean[y == 1].mean() + mean[y == 0].mean())
    unit = mean[~y.isnan()].square().mean().sqrt()
    expected = 0.5 * ((0.5 - mean[y == 1] / unit).relu().mean() + (0.5 + mean[y == 0] / unit).relu().mean())
    torch.testing.assert_close(a_cluster(step, form="hinge")(step), expected)


def test_from_the_bar_each_member_counts_from_its_own_threshold() -> None:
    step = a_step(architecture="jumprelu")
    with torch.no_grad():
        step.sae.threshold.copy_(torch.linspace(0.0, 2.0, step.sae.d_sae))
    step = a_step(sae=step.sae)
    members = torch.tensor([LATENT, *OTHERS])
    scores = (step.sequences.code.pre(members) - step.sae.threshold[members]).mean(1)
    y = step.sequences.labels[step.sequences.mask.nonzero()[:, 0], 0]
    expected = scores[y == 0].mean() - scores[y == 1].mean()
    torch.testing.assert_close(a_cluster(step, form="raw", zero="bar")(step), expected)
    unit = scores[~y.isnan()].square().mean().sqrt()
    expected = 0.5 * ((0.5 - scores[y == 1] / unit).relu().mean() + (0.5 + scores[y == 0] / unit).relu().mean())
    torch.testing.assert_close(a_cluster(step, form="hinge", zero="bar")(step), expected)


@pytest.mark.parametrize("form", ["raw", "hinge", "bce", "pairwise"])
@pytest.mark.parametrize("zero", ["middle", "bar"])
def test_dead_latents_move(form: str, zero: str) -> None:
    """The same loss on gated activations has no gradient for latents that do not fire; this one does."""
    step = a_step()
    cluster = torch.tensor([LATENT, *OTHERS])
    with torch.no_grad():
        step.sae.b_enc[cluster] = -100.0
    step = a_step(sae=step.sae)
    assert not bool(step.sequences.code.columns(cluster).any())
    gated = step.sequences.code.columns(cluster).mean()
    assert not gated.requires_grad or not bool(torch.autograd.grad(gated, step.sae.W_enc, allow_unused=True)[0].any())
    value = a_cluster(step, form=form, zero=zero)(step)
    (gradient,) = torch.autograd.grad(value, step.sae.W_enc)
    assert bool((gradient[:, cluster].norm(dim=0) > 1e-9).all())
    others = torch.ones(step.sae.d_sae, dtype=torch.bool)
    others[cluster] = False
    assert not bool(gradient[:, others].any())


@pytest.mark.parametrize("form", ["hinge", "bce", "pairwise"])
@pytest.mark.parametrize("zero", ["middle", "bar"])
def test_scale_changes_all_forms_but_raw_not(form: str, zero: str) -> None:
    step = a_step()
    sae = copy.deepcopy(step.sae)
    with torch.no_grad():
        sae.W_enc.mul_(3.0)
        sae.b_enc.mul_(3.0)
        sae.W_dec.div_(3.0)
    scaled = a_step(sae=sae)
    first, second = (a_cluster(s, form=form, zero=zero)(s).detach() for s in (step, scaled))
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)
    raw = [a_cluster(s, form="raw")(s).detach() for s in (step, scaled)]
    torch.testing.assert_close(3 * raw[0], raw[1])


def test_without_a_graph_or_a_class_it_is_silent() -> None:
    step = a_step()
    loss = a_cluster(step)
    assert loss.active(step)
    assert not loss.active(a_step(graph=False))
    assert not loss.active(a_step(sequences=torch.ones(6, 2)))
    assert not loss.active(a_step(sequences=torch.full((6, 2), torch.nan)))


def test_a_new_graph_is_seen() -> None:
    step = a_step()
    loss = a_cluster(step, form="raw")
    loss(step)
    step.graph = FeatureGraph.of(step.sae, torch.empty(2, 0, dtype=torch.long), torch.empty(0))
    pre, y = pre_activations(step)
    torch.testing.assert_close(loss(step), -(pre[y == 1, 0].mean() - pre[y == 0, 0].mean()))


def test_a_cluster_is_a_latent_and_its_neighbours() -> None:
    assert cluster_of(a_step().graph, LATENT).tolist() == [LATENT, *OTHERS]


def test_bad_options_are_refused_before_training() -> None:
    step = a_step()
    with pytest.raises(UsageError, match=r"^latents: .*'nothing'"):
        a_cluster(step, {"nothing": 1})
    with pytest.raises(UsageError, match=r"^latents: .*64"):
        a_cluster(step, {"code": 64})


def test_a_run_without_the_callback_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"loss\.cluster.*'graph'.*refresh_graph"):
        tiny_run(tmp_path, loss=[{"use": "mse"}, {"use": "cluster"}])


class Watch:
    """A view that records after which steps the trainer's graph changed."""

    def __init__(self) -> None:
        self.graphs: list[tuple[int, FeatureGraph]] = []

    @hookimpl
    def step_ended(self, trainer: Any, number: int) -> None:
        if trainer.graph is not None and (not self.graphs or self.graphs[-1][1] is not trainer.graph):
            self.graphs.append((number + 1, trainer.graph))


def a_run(place: Path, builder: dict[str, Any], **changes: Any) -> tuple[Watch, dict[str, Any]]:
    from saekit.testing.tiny import carried_out, tiny_table

    watch = Watch()
    callback = {"use": "refresh_graph", "builder": builder, "start": 3, "every": 4, "batches": 2}
    table = {
        **tiny_table(),
        "loss": [{"use": "mse"}, {"use": "cluster", "weight": 0.1}],
        "callback": [callback],
        **changes,
    }
    return watch, carried_out(table, place, Registry(), watch).summary


@pytest.mark.parametrize("builder", ["cosine", "correlation", "coactivation", "pmi"])
def test_the_graph_is_built_when_it_is_time_and_the_loss_sees_it(tmp_path: Path, builder: str) -> None:
    watch, summary = a_run(tmp_path, {"use": builder, "k": 3})
    assert [after for after, _ in watch.graphs] == [3, 7, 11]
    assert {graph.builder for _, graph in watch.graphs} == {f"graph.{builder}"}
    assert len({graph.dictionary for _, graph in watch.graphs}) == 3
    assert "cluster" in summary["losses"]


def test_an_empty_graph_is_told(tmp_path: Path) -> None:
    _, summary = a_run(tmp_path, {"use": "cosine", "above": 2.0})
    assert any("no edges" in warning for warning in summary["warnings"])


def test_its_state_is_what_it_was_in_the_middle_of_gathering_codes() -> None:
    component = Registry().find("graph_builder", "coactivation")
    choice = ComponentOption(use="coactivation")
    choice._component, choice._options = component, component.validate({}, "builder")
    callback = RefreshGraph(builder=choice, start=3, every=4, batches=2)

    class Trainer:
        device, graph = torch.device("cpu"), None
        step = make_step()
        sae = step.sae

    trainer = Trainer()
    for number in range(6):  # after 3 steps a graph, and after 6 one of two codes for the next
        callback.step_ended(trainer, number)
    assert len(callback.window) == 1
    other = RefreshGraph(builder=choice, start=3, every=4, batches=2)
    other.load_state_dict(callback.state_dict())
    second = Trainer()
    other.training_started(second)
    assert second.graph == trainer.graph
    assert other.refreshed == 3
    for one, at in ((callback, trainer), (other, second)):
        one.step_ended(at, 6)
    assert second.graph == trainer.graph
    assert second.graph.edge_index.shape[1] > 0
