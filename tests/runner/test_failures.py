"""A metric or an analyzer that fails, or changes the SAE, costs its own result alone, and can be carried out again alone."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import weights

import saekit
from saekit import Component, Result, UsageError
from saekit.errors import PluginError, RunError
from saekit.plugins import Registry
from saekit.runner.run import Run
from saekit.testing import registry_of, tiny_run


class Counts:
    """A sound streaming metric: how many rows it saw, and a sum over the code."""

    name = "counts"

    def __init__(self) -> None:
        self.rows, self.total = 0, 0.0

    def update(self, step: Any) -> None:
        self.rows += len(step.x)
        self.total += float(step.code.sum().sum())

    def compute(self) -> dict[str, float | None]:
        return {self.name: self.rows, f"{self.name}_sum": self.total}


class RaisesOnUpdate(Counts):
    def update(self, step: Any) -> None:
        raise KeyError("no such row")


class RaisesOnPrepare(Counts):
    def prepare(self, context: Any) -> None:
        raise RuntimeError("no licence")


class Leaves(Counts):
    def compute(self) -> dict[str, float | None]:
        raise SystemExit(0)


class OfNothing:
    def measure(self, context: Any) -> dict[str, float | None]:
        raise UsageError("there is nothing to measure.")


class OutOfMemory(Counts):
    def compute(self) -> dict[str, float | None]:
        raise torch.OutOfMemoryError("CUDA out of memory")


class SameName(Counts):
    def compute(self) -> dict[str, float | None]:
        return {"counts": -1.0}


METRICS: list[tuple[type, type[Exception], str]] = [
    (RaisesOnUpdate, PluginError, "KeyError: 'no such row'"),
    (RaisesOnPrepare, PluginError, "RuntimeError: no licence"),
    (Leaves, PluginError, "SystemExit: 0"),
    (OfNothing, UsageError, "there is nothing to measure."),
    (OutOfMemory, RunError, "not enough memory"),
    (SameName, RunError, "both return 'counts'"),
]


def found(context: Any) -> Result:
    """An analyzer that draws."""
    return Result(scalars={"drawn": float(torch.rand(()))})


def failing(context: Any) -> Result:
    torch.rand(10)
    raise ZeroDivisionError("by zero")


def summary_of(place: Path) -> dict[str, Any]:
    return json.loads((place / "summary.json").read_text())


@pytest.mark.parametrize(("metric", "kind", "reason"), METRICS, ids=lambda value: getattr(value, "__name__", None))
def test_a_metric_that_fails_costs_its_own_result(metric: type, kind: type[Exception], reason: str, tmp_path: Path) -> None:
    registry = registry_of(metric=[Component("counts", Counts), Component("bad", metric)], analyzer=Component("found", found))
    uses = {"metric": [{"use": "counts"}, {"use": "bad"}], "analyzer": [{"use": "found"}]}
    with pytest.raises(kind, match=r"(?s)Everything else is written.*saekit run --resume") as caught:
        tiny_run(tmp_path / "run", registry=registry, **uses)
    assert reason in str(caught.value)
    summary = summary_of(tmp_path / "run")
    assert list(summary["failed"]) == ["metric.bad"]
    assert reason in summary["failed"]["metric.bad"]
    assert summary["metrics"]["counts"] > 0
    assert summary["analysis"]["found"]
    assert reason in html.unescape((tmp_path / "run" / "report.html").read_text())
    with pytest.raises(kind):
        again(tmp_path / "run", registry)  # nothing is mended
    after = summary_of(tmp_path / "run")
    assert list(after["failed"]) == ["metric.bad"]
    assert after["metrics"] == summary["metrics"]


def test_an_analyzer_that_fails_can_be_carried_out_again_alone(tmp_path: Path) -> None:
    uses = {"metric": [{"use": "counts"}], "analyzer": [{"use": "first"}, {"use": "last"}]}

    def registry(last: Any) -> Registry:
        return registry_of(metric=Component("counts", Counts), analyzer=[Component("first", found), Component("last", last)])

    whole = tiny_run(tmp_path / "whole", registry=registry(found), **uses).summary
    with pytest.raises(PluginError, match="ZeroDivisionError: by zero"):
        tiny_run(tmp_path / "run", registry=registry(failing), **uses)
    before, trained = summary_of(tmp_path / "run"), weights(tmp_path / "run")
    assert list(before["failed"]) == ["analyzer.last"]
    assert list(before["analysis"]) == ["first"]

    again(tmp_path / "run", registry(found))
    after = summary_of(tmp_path / "run")
    assert after["failed"] == {}
    assert after["analysis"] == whole["analysis"]  # to the bit, whatever the one that failed has drawn
    same = ("metrics", "headline", "tokens", "steps", "losses", "tokens_per_second")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    assert weights(tmp_path / "run") == trained
    assert not any("by zero" in message for message in after["warnings"])
    assert "by zero" not in (tmp_path / "run" / "report.html").read_text()


def again(place: Path, registry: Registry) -> None:
    """`saekit run --resume`, with a registry in memory."""
    from saekit.run_directory import RunDirectory
    from saekit.runner.plan import plan_run

    with RunDirectory.resume(str(place)) as (directory, config):
        summary = directory.finished_summary()
        assert summary is not None
        Run(plan_run(config, registry), directory, registry).measure_again(summary)


def test_a_metric_is_measured_again_alone_and_in_its_variant(tmp_path: Path) -> None:
    variants = [{"name": "a"}, {"name": "b", "training": {"seed": 3}, "metric": [{"use": "counts"}, {"use": "odd"}]}]
    uses = {"metric": [{"use": "counts"}], "variant": variants}

    def registry(odd: Any) -> Registry:
        return registry_of(metric=[Component("counts", Counts), Component("odd", odd)])

    with pytest.raises(PluginError, match=r"^variant 'b': .*no such row"):
        tiny_run(tmp_path / "run", registry=registry(RaisesOnUpdate), **uses)
    before = summary_of(tmp_path / "run")
    assert list(before["failed"]) == ["variant 'b': metric.odd"]
    assert [list(before["variants"][name]["failed"]) for name in "ab"] == [[], ["metric.odd"]]

    class Odd(Counts):
        name = "odd"

    again(tmp_path / "run", registry(Odd))
    after = summary_of(tmp_path / "run")
    assert after["variants"]["a"] == before["variants"]["a"]
    own = after["variants"]["b"]
    assert own["failed"] == after["failed"] == {}
    assert own["metrics"]["odd"] == own["metrics"]["counts"]
    assert json.loads((tmp_path / "run/variants/b/summary.json").read_text())["metrics"] == own["metrics"]


def test_it_is_not_measured_again_on_other_data(tmp_path: Path) -> None:
    with pytest.raises(PluginError):
        tiny_run(tmp_path / "run", registry=registry_of(analyzer=Component("x", failing)), analyzer=[{"use": "x"}])
    path = tmp_path / "run" / "provenance.json"
    made_by = json.loads(path.read_text())
    path.write_text(json.dumps(made_by | {"source": {**made_by["source"], "seed": 77}}))
    with pytest.raises(UsageError, match="trained on another model or other data"):
        again(tmp_path / "run", registry_of(analyzer=Component("x", found)))


# --- the SAE as it is given ---------------------------------------------------------------------------------------


def in_place(sae: saekit.SparseAutoencoder) -> None:
    with torch.no_grad():
        sae.W_dec.mul_(0.5)


def past_the_count(sae: saekit.SparseAutoencoder) -> None:
    sae.W_enc.data *= 2.0


def permuted(sae: saekit.SparseAutoencoder) -> None:
    sae.W_dec.data = sae.W_dec.data.flip(0)


def another_option(sae: saekit.SparseAutoencoder) -> None:
    sae.k = 1


SPOILERS = [in_place, past_the_count, permuted, another_option]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("when", ["update", "compute", "analyse"])
def test_an_sae_that_is_changed_falsifies_nothing_after_it(when: str, spoil: Any, tmp_path: Path) -> None:
    class Spoils(Counts):
        def prepare(self, context: Any) -> None:
            self.sae = context.sae

        def update(self, step: Any) -> None:
            if when == "update":
                spoil(self.sae)

        def compute(self) -> dict[str, float | None]:
            if when == "compute":
                spoil(self.sae)
            return {"spoils": 1.0}

    def spoiling(context: Any) -> Result:
        spoil(context.sae)
        return Result(scalars={"found": 1.0})

    class Firing:
        def measure(self, context: Any) -> dict[str, float | None]:
            return {"firing": sum(float(step.code.sum().sum()) for step in context.held_out())}

    def looks(context: Any) -> Result:
        return Result(scalars={"sum": float(context.sae.W_dec.sum() + context.sae.W_enc.sum()), "k": context.sae.k})

    registry = registry_of(
        metric=[Component("spoils", Spoils), Component("counts", Counts), Component("firing", Firing)],
        analyzer=[Component("spoils", spoiling), Component("looks", looks)],
    )
    after = {"metric": [{"use": "counts"}, {"use": "firing"}], "analyzer": [{"use": "looks"}]}
    section = "analyzer" if when == "analyse" else "metric"
    sound = tiny_run(tmp_path / "sound", registry=registry, **after).summary
    with pytest.raises(PluginError, match=f"{section} 'spoils' .*changed the SAE that it was given"):
        tiny_run(tmp_path / "run", registry=registry, **{**after, section: [{"use": "spoils"}, *after[section]]})
    summary = summary_of(tmp_path / "run")
    assert list(summary["failed"]) == [f"{section}.spoils"]
    assert "spoils" not in summary["metrics"] | summary["analysis"]
    assert summary["metrics"] == sound["metrics"]
    assert summary["analysis"] == sound["analysis"]


def test_moving_the_sae_or_putting_it_back_is_allowed(tmp_path: Path) -> None:
    def analyzer(context: Any) -> Result:
        kept = context.sae.W_dec.detach().clone()
        in_place(context.sae)
        with torch.no_grad():
            context.sae.W_dec.copy_(kept)
        context.sae.W_enc.data = context.sae.W_enc.data.clone()
        return Result()

    run = tiny_run(tmp_path / "run", registry=registry_of(analyzer=Component("x", analyzer)), analyzer=[{"use": "x"}])
    assert run.summary["failed"] == {}
