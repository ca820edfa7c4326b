"""The three ways to run the checks, expected failures, the fixtures, and what they cost."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Fakes, Outcome, python, running

import saekit.testing
from saekit import Component, DenseCode, SparseCode
from saekit.errors import PluginError, UsageError
from saekit.testing import check, checks_of, make_step, registry_of, synthetic_truth, tiny_language_run, tiny_run

GOOD = '''
from saekit import Component, hookimpl

def good(step, *, power: float = 1.0):
    """The code's sum to a power."""
    return (step.code.sum() ** power).mean()

def bad(step):
    """Forgets the mean."""
    return step.code.sum()

@hookimpl
def saekit_losses():
    yield Component("good", good)
    yield Component("bad", bad)
'''


def spread(step):
    """The standard deviation over the batch."""
    return step.code.sum().std()


# --- by hand ---------------------------------------------------------------------------------------------------


def test_a_report_tells_every_check() -> None:
    report = check("loss", "mse")
    assert report.ok
    assert [outcome.check for outcome in report.outcomes] == [each.name for each in checks_of("loss")]
    assert report.component.qualified_name == "builtin.mse"
    assert json.loads(json.dumps(report.to_json()))["ok"] is True
    assert "passed   scalar" in str(report)


def test_an_expected_failure_is_told_with_its_reason() -> None:
    registry = registry_of(loss=Component("spread", spread))
    reason = "a spread is of several rows"
    report = check("loss", "spread", registry=registry, expected={"batch_of_one": reason})
    assert report.ok
    assert [(o.check, o.message) for o in report.outcomes if o.status == "expected"] == [("batch_of_one", reason)]


def test_an_expected_failure_that_passes_is_an_error() -> None:
    report = check("loss", "mse", expected={"batch_of_one": "a spread is of several rows"})
    assert [outcome.check for outcome in report.failures] == ["batch_of_one"]
    assert "a spread is of several rows" in report.failures[0].message


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: check("loss", "mse", expected={"batch_of_on": "why"}), "batch_of_one"),
        (lambda: check("losses", "mse"), "'loss'"),
        (lambda: check("loss", "msee"), "'mse'"),
        (lambda: check("loss", "auxk", options={"kk": 3}), "'k'"),
        (lambda: check("source", "synthetic"), "d_in"),
        (lambda: registry_of(los=Component("spread", spread)), "no kind 'los'. Did you mean 'loss'"),
    ],
)
def test_what_is_misspelt_is_refused(call: Callable[[], object], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        call()


def test_options_reach_the_component() -> None:
    def scaled(step, *, by: float):
        return by * step.code.sum().mean()

    registry = registry_of(loss=Component("scaled", scaled, "A scaled sum."))
    zero, one = (check("loss", "scaled", options={"by": by}, registry=registry) for by in (0.0, 1.0))
    assert "gradient_reaches" in {outcome.check for outcome in zero.failures}
    assert "gradient_reaches" not in {outcome.check for outcome in one.failures}


# --- the command -----------------------------------------------------------------------------------------------


def test_the_command_checks_a_component(command: Callable[..., Outcome]) -> None:
    done = command("check", "auxk", "-o", "k=4")
    assert done.code == 0
    assert "loss 'auxk' of plugin 'builtin'" in done.out
    assert all(each.name in done.out for each in checks_of("loss"))


def test_the_command_fails_with_the_plugin_s_code_and_says_who(
    command: Callable[..., Outcome], plugin_file: Callable[[str, str], Path]
) -> None:
    path = plugin_file("losses", GOOD)
    done = command("check", "losses", "--plugin", path)
    assert done.code == 3
    done.says("loss 'bad' of plugin 'losses'", str(path), "scalar", "[32]", ".mean()")
    done.says("loss 'good'", "options_documented", "'power'", "Field(description=")
    assert command("check", "bad", "--plugin", path).code == 3


def test_the_command_s_document(command: Callable[..., Outcome], plugin_file: Callable[[str, str], Path]) -> None:
    done = command("check", "bad", "--plugin", plugin_file("losses", GOOD), "--json")
    (report,) = json.loads(done.out)
    assert done.code == 3
    assert report["ok"] is False
    assert [c["check"] for c in report["checks"] if c["status"] == "failed"] == ["scalar"]


def test_a_name_of_two_kinds_asks_which(command: Callable[..., Outcome]) -> None:
    done = command("check", "matryoshka")
    assert done.code == 2
    done.says("--kind", "architecture", "loss")
    assert command("check", "matryoshka", "--kind", "loss").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["msee"], ["'mse'", "saekit plugins"]),
        (["synthetic"], ["d_in", "required"]),
        (["revival", "-o", "every=3"], ["plugin"]),
        (["mse", "-o", "power=3"], ["power"]),
    ],
)
def test_the_command_refuses(arguments: list[str], words: list[str], command: Callable[..., Outcome]) -> None:
    done = command("check", *arguments)
    assert done.code == 2
    done.says(*words)


def test_a_plugin_s_components_that_need_options_are_named(
    command: Callable[..., Outcome], plugin_file: Callable[[str, str], Path]
) -> None:
    text = GOOD.replace("power: float = 1.0", "power: float").replace('    yield Component("bad", bad)\n', "")
    path = plugin_file("asks", text)
    done = command("check", "asks", "--plugin", path)
    assert done.code == 0
    done.says("left out", "saekit check asks.good -o power=")


# --- in pytest -------------------------------------------------------------------------------------------------


def test_conformance_and_the_fixtures_in_a_plugin_s_tests(tmp_path: Path, fakes: Fakes) -> None:
    """A project of somebody else's: one line of conformance, and tests that use the fixtures without importing them."""
    hooks = """
    from saekit import Component, hookimpl

    @hookimpl
    def saekit_losses():
        yield Component("spread", "spread_target:spread", "The spread of the code over the batch.")
        yield Component("crooked", "spread_target:crooked", "Forgets the mean.")
    """
    target = """
    def spread(step):
        return step.code.sum().std()

    def crooked(step):
        return step.code.sum()
    """
    fakes.install("saekit-spread", "0.1", "spread", "spread_hooks", spread_hooks=hooks, spread_target=target)
    tests = """
    import saekit.testing
    from saekit import Component

    test_spread = saekit.testing.conformance("loss", "spread", expected={"batch_of_one": "a spread is of several rows"})
    test_crooked = saekit.testing.conformance("loss", "crooked")

    def test_fixtures(saekit_step, saekit_truth, saekit_registry, saekit_tiny_run):
        assert len(saekit_step(batch=3).code) == 3
        assert saekit_truth.directions.shape == (32, 16)
        own = Component("own", lambda step: step.x.sum(), "A loss.")
        assert saekit_registry(loss=own).find("loss", "own").target is own.target
        assert (saekit_tiny_run.directory / "summary.json").is_file()
    """
    place = tmp_path / "project"
    place.mkdir()
    (place / "test_spread.py").write_text(textwrap.dedent(tests), encoding="utf-8")
    with running("-q", "-rA", "-p", "no:cacheprovider", place, module="pytest", at=place) as process:
        out, _ = process.communicate(300)
    lines = out.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert len(failed) == 1, out
    assert "test_crooked[scalar]" in failed[0]
    assert "saekit-spread 0.1" in out
    assert any("XFAIL" in line and "a spread is of several rows" in line for line in lines), out
    assert any(line.startswith("PASSED") and line.endswith("test_fixtures") for line in lines)


def test_unused_fixtures_import_neither_torch_nor_the_checks(tmp_path: Path) -> None:
    path = tmp_path / "test_light.py"
    path.write_text(
        "import sys\n"
        "def test_light():\n"
        "    assert 'saekit.testing.pytest_plugin' in sys.modules\n"
        "    heavy = {'torch', 'pydantic', 'pluggy.x', 'saekit.testing.running', 'saekit.plugins'}\n"
        "    assert not heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_importing_the_package_is_cheap() -> None:
    python("import sys, saekit.testing; assert not {'torch', 'pydantic'} & set(sys.modules)")


def test_every_public_name_is_there() -> None:
    for name in saekit.testing.__all__:
        assert getattr(saekit.testing, name).__name__ == name


# --- fixtures --------------------------------------------------------------------------------------------------


def test_a_step_in_both_forms_is_the_same() -> None:
    sparse, dense = make_step(), make_step(sparse=False)
    assert isinstance(sparse.code, SparseCode)
    assert isinstance(dense.code, DenseCode)
    torch.testing.assert_close(sparse.code.dense(), dense.code.dense(), rtol=0, atol=0)
    torch.testing.assert_close(sparse.reconstruction, dense.reconstruction)
    gradients = []
    for step in (sparse, dense):
        step.error.square().mean().backward()
        gradients.append(step.sae.W_enc.grad)
    torch.testing.assert_close(*gradients)


def test_a_step_holds_what_is_asked_for() -> None:
    step = make_step(batch=5, labels=True, tokens=True, dead=3, dtype=torch.float64, number=7, fraction=0.5)
    assert step.x.shape == (5, 16)
    assert step.x.dtype == step.reconstruction.dtype == torch.float64
    assert step.labels is not None
    assert step.labels.shape == (5, 2)
    assert step.tokens is not None
    assert step.dead is not None
    assert int(step.dead.sum()) == step.n_dead == 3
    assert (step.number, step.fraction) == (7, 0.5)
    assert set(make_step(batch=200, labels=True).labels.nan_to_num(2).unique().tolist()) == {0, 1, 2}  # type: ignore[union-attr]
    plain = make_step()
    assert plain.labels is None
    assert plain.tokens is None


def test_the_planted_truth_is_what_the_activations_are_made_of() -> None:
    truth = synthetic_truth(n=500)
    rebuilt = truth.code.dense() @ truth.directions
    assert float((truth.x - rebuilt).std()) == pytest.approx(0.01, rel=0.1)  # the source's noise
    torch.testing.assert_close(truth.directions.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(truth.labels, (truth.code.dense()[:, :2] != 0).float())


def test_tiny_runs(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "known", loss=[{"use": "mse"}, {"use": "l1", "weight": 0.1}])
    assert set(run.summary["losses"]) >= {"mse", "l1"}
    assert run.context.source.truth.shape == (32, 16)
    language = tiny_language_run(tmp_path / "language", analyzer=[{"use": "features"}])
    assert "features" in language.summary["analysis"]
    assert next(iter(language.context.held_out())).tokens is not None
    assert set(language.context.source.concepts) == {"even", "short"}


def test_a_registry_in_memory_goes_through_the_door() -> None:
    with pytest.raises(PluginError, match="not a name"):
        registry_of(loss=Component("Not A Name", spread))
    registry = registry_of(loss=Component("mse", spread))
    assert registry.find("loss", "mse").target is spread
    assert registry.find("loss", "mse").summary == "The standard deviation over the batch."
