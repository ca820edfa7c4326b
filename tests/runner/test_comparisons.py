"""A comparison sees every SAE of a run with all that is known of it, and costs its own result alone when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import saekit
from saekit import Compared, ComparisonContext, Component, Result, UsageError
from saekit.api import resume
from saekit.errors import PluginError
from saekit.plugins import Registry
from saekit.run_file import parse_config
from saekit.runner.plan import plan_run
from saekit.testing import registry_of, tiny_run
from saekit.testing.tiny import tiny_table

VARIANTS = [{"name": "low", "architecture": {"k": 2}}, {"name": "high", "loss": {"mse": {"weight": 2.0}}}]


def found(context: Any) -> Result:
    """An analyzer."""
    return Result(scalars={"k": context.sae.k}, tables={"t": [{"d": context.sae.d_sae}]}, notes=["As asked."])


def seen_by(seen: dict[str, Compared]) -> Any:
    def looks(context: ComparisonContext) -> Result:
        seen.update(context.variants)
        (context.directory / "names.txt").write_text(" ".join(context.variants))
        return Result(scalars={"n": len(context.variants)}, files=["names.txt"], notes=["All of them."])

    return looks


def registry(**targets: Any) -> Registry:
    return registry_of(analyzer=Component("found", found), comparison=[Component(name, t) for name, t in targets.items()])


def uses(*names: str) -> dict[str, Any]:
    return {"analyzer": [{"use": "found"}], "comparison": [{"use": name} for name in names]}


def test_it_sees_every_variant_with_its_metrics_results_and_history(tmp_path: Path) -> None:
    seen: dict[str, Compared] = {}
    run = tiny_run(tmp_path / "run", registry=registry(looks=seen_by(seen)), **uses("looks"), variant=VARIANTS)
    assert list(seen) == ["low", "high"]
    for name, one in seen.items():
        own = run.summary["variants"][name]
        assert one.summary["metrics"] == own["metrics"]
        assert one.summary["analysis"] == own["analysis"] == {"found": {"k": one.context.sae.k}}
        assert one.results == {"found": found(one.context)}
        lines = (run.directory / "variants" / name / "metrics.jsonl").read_text().splitlines()
        assert one.history == [json.loads(line) for line in lines]
        assert one.context.directory == run.directory / "variants" / name
    assert seen["low"].context.sae.k == 2
    assert seen["high"].context.config.loss[0].weight == 2.0
    assert seen["low"].context.config.comparison == []


def test_what_it_finds_is_a_result_of_the_whole_run(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", registry=registry(looks=seen_by({})), **uses("looks"), variant=VARIANTS)
    assert run.summary["analysis"] == {"looks": {"n": 2}}
    assert run.summary["analysis_notes"] == {"looks": ["All of them."]}
    assert json.loads((run.directory / "analysis/looks/result.json").read_text())["scalars"] == {"n": 2}
    report = (run.directory / "report.html").read_text()
    assert "All of them." in report
    assert 'href="analysis/looks/names.txt"' in report
    assert "analysis/looks/result.json" in (run.directory / "SHA256SUMS").read_text()
    assert "looks" not in run.summary["variants"]["low"]["analysis"]
    assert "comparison" not in (run.directory / "variants/low/run.toml").read_text().replace("comparison = []", "")


def test_a_run_without_variants_has_one_entry(tmp_path: Path) -> None:
    seen: dict[str, Compared] = {}
    run = tiny_run(tmp_path / "run", registry=registry(looks=seen_by(seen)), **uses("looks"), recipe="mine")
    assert list(seen) == ["mine"]
    assert seen["mine"].results.keys() == {"found"}  # and not what another comparison has written beside it
    assert run.summary["analysis"] == {"found": {"k": 8}, "looks": {"n": 1}}


def raises(context: ComparisonContext) -> Result:
    raise KeyError("no such variant")


def spoils(context: ComparisonContext) -> Result:
    context.variants["high"].context.sae.W_dec.data[0] *= 2
    return Result()


@pytest.mark.parametrize(("bad", "says"), [(raises, "no such variant"), (spoils, "changed the SAE of variant 'high'")])
def test_one_that_fails_costs_its_own_result_alone_and_is_carried_out_again(bad: Any, says: str, tmp_path: Path) -> None:
    seen: dict[str, Compared] = {}
    with pytest.raises(PluginError, match=says):
        tiny_run(tmp_path / "run", registry=registry(bad=bad, looks=seen_by(seen)), **uses("bad", "looks"), variant=VARIANTS)
    saved = saekit.load_sae(tmp_path / "run/variants/high/sae")
    assert (seen["high"].context.sae.W_dec == saved.W_dec).all()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert list(summary["failed"]) == ["comparison.bad"]
    assert summary["analysis"] == {"looks": {"n": 2}}
    assert says.replace("'", "&#39;") in (tmp_path / "run/report.html").read_text()


def test_the_comparisons_of_a_run_are_made_again_with_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(context: Any) -> Result:
        raise KeyError("nothing")

    one = {"analyzer": [{"use": "found"}], "comparison": [{"use": "looks"}], "variant": VARIANTS}
    first: dict[str, Compared] = {}
    before = registry_of(analyzer=Component("found", broken), comparison=Component("looks", seen_by(first)))
    with pytest.raises(PluginError):
        tiny_run(tmp_path / "run", registry=before, **one)
    assert first["low"].results == {}
    again: dict[str, Compared] = {}
    monkeypatch.setattr("saekit.api.Registry", lambda **_: registry(looks=seen_by(again)))
    summary = resume(str(tmp_path / "run")).summary
    assert summary["failed"] == {}
    assert summary["warnings"] == []
    assert again["low"].results["found"].scalars == {"k": 2}


def refused(**sections: Any) -> str:
    with pytest.raises(UsageError) as error:
        plan_run(parse_config({**tiny_table(), **sections}, "a test"), registry(looks=seen_by({})))
    return str(error.value)


def test_a_plan_refuses_what_cannot_be() -> None:
    both = refused(analyzer=[{"use": "found", "name": "x"}], comparison=[{"use": "looks", "name": "x"}])
    assert "comparison.x" in both
    assert "analysis/x" in both
    assert "comparison.lokos" in refused(comparison=[{"use": "lokos"}])
    assert "variant.a.comparison" in refused(variant=[{"name": "a", "comparison": [{"use": "looks"}]}])
    needy = registry_of(comparison=Component("needy", seen_by({}), needs=("graph",)))
    with pytest.raises(UsageError, match=r"comparison\.needy.*needs 'graph'.*\[graph\]"):
        plan_run(parse_config({**tiny_table(), "comparison": [{"use": "needy"}], "variant": VARIANTS}, "a test"), needy)


def test_a_default_comparison_joins_the_run_and_not_its_variants() -> None:
    known = registry_of(comparison=Component("always", seen_by({}), default=True))
    plan = plan_run(parse_config({**tiny_table(), "variant": VARIANTS}, "a test"), known)
    assert [part.key for part in plan.comparisons] == ["comparison.always"]
    assert [member.config.comparison for member in plan.members] == [[], []]
