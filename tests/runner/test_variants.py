"""Several SAEs in one pass: each to the bit what it is alone, whatever stands beside it, through a resume as well."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from helpers import STEPS, Outcome, leftovers, listener_plugin, logged, tiny_table, weights

import saekit
from saekit.activations.shuffle import ShuffledBatches
from saekit.builtin.sources.text import TextSource
from saekit.training import checkpoint

# A loss and a callback that draw from torch's own generators: what one variant draws must not shift its neighbours' draws.
DRAWS = """
import torch
from saekit import Component, hookimpl

class Noisy(torch.nn.Module):
    '''Parameters that are drawn when it is built, and draws of its own in every step.'''
    def __init__(self, *, draws: int = 1):
        super().__init__()
        self.head, self.draws = torch.nn.Linear(32, 4), draws
    def __call__(self, step):
        keep = [torch.rand(len(step.x), 1) > 0.5 for _ in range(self.draws)][-1]
        return (self.head(step.reconstruction) * keep).square().mean()

class Shaker:
    '''Moves the weights by draws from torch's own generator.'''
    @hookimpl
    def step_ended(self, trainer):
        with torch.no_grad():
            trainer.sae.b_enc.add_(torch.randn(trainer.sae.b_enc.shape) * 1e-3)

@hookimpl
def saekit_losses():
    yield Component("noisy", Noisy)

@hookimpl
def saekit_callbacks():
    yield Component("shaker", Shaker)
"""
VARIANTS: list[dict[str, Any]] = [
    {"name": "base"},
    {"name": "noisy", "loss": [{"use": "mse"}, {"use": "noisy", "draws": 2}], "callback": [{"use": "shaker"}]},
    {"name": "other", "training": {"seed": 3, "lr": 5e-3}, "architecture": {"use": "standard", "d_sae": 128}},
    {"name": "wide", "architecture": {"d_sae": 96}, "loss": {"noisy": {"weight": 0.1}}, "training": {"log_every": 3}},
]
BASE: dict[str, Any] = {
    "loss": [{"use": "mse"}, {"use": "auxk", "weight": 0.1}, {"use": "noisy"}],
    "callback": [{"use": "resample", "every": 7, "below": 0.05}],
    "training__dead_after": 128,
    "training__keep_checkpoints": 9,
}


@pytest.fixture
def run_variants(command: Callable[..., Outcome], run_file: Callable[..., Path], plugin_file: Callable, tmp_path: Path):
    """Carries out the run file above with some of its variants, and gives its directory."""

    def run(*names: str, where: str = "run", **changes: Any) -> Path:
        chosen = [variant for variant in VARIANTS if variant["name"] in (names or [v["name"] for v in VARIANTS])]
        file = run_file(**{**BASE, "variant": chosen, "analyzer": [{"use": "features"}], **changes})
        directory = tmp_path / where
        done = command("run", file, "--plugin", plugin_file("draws", DRAWS), "--directory", directory)
        assert done.code == 0, done.err
        return directory

    return run


@pytest.fixture(scope="module")
def all_of_them(tiny_gpt2: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with all variants, for tests that only read it."""
    place = tmp_path_factory.mktemp("variants")
    table = tiny_table(tiny_gpt2, text_file, **{**BASE, "variant": VARIANTS, "analyzer": [{"use": "features"}]})
    (place / "run.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    (place / "draws.py").write_text(DRAWS, encoding="utf-8")
    return saekit.run(place / "run.toml", plugins=[place / "draws.py"], directory=place / "run").directory


def numbers(run: Path) -> list[dict[str, Any]]:
    """What was logged, but for what a clock says."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in logged(run)]


def found(run: Path) -> dict[str, Any]:
    """What the run came to, but for what a clock says and what it is called."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {key: summary[key] for key in ("sae", "metrics", "headline", "analysis", "losses", "tokens", "steps")}


def same(one: Path, other: Path) -> bool:
    return weights(one) == weights(other) and numbers(one) == numbers(other) and found(one) == found(other)


def test_a_variant_is_to_the_bit_what_its_run_file_gives_alone(
    all_of_them: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    for variant in VARIANTS:
        place, alone = all_of_them / "variants" / variant["name"], tmp_path / variant["name"]
        assert command("run", place / "run.toml", "--directory", alone).code == 0
        assert same(place, alone), variant["name"]
        assert (place / "run.toml").read_bytes() == (alone / "run.toml").read_bytes()
    bits = [weights(all_of_them / "variants" / variant["name"]) for variant in VARIANTS]
    assert len(set(bits)) == len(VARIANTS)


def test_it_does_not_depend_on_its_neighbours(all_of_them: Path, run_variants: Callable) -> None:
    pair = run_variants("noisy", "wide", where="pair")
    turned = run_variants(where="turned", variant=VARIANTS[::-1])
    for name in ("noisy", "wide"):
        for other in (pair, turned):
            assert same(all_of_them / "variants" / name, other / "variants" / name)


def test_a_run_without_variants_leaves_torchs_generator_as_it_was(run_variants: Callable) -> None:
    """And so a run in a notebook does not seed the cells that come after it; its draws are its own."""
    import torch

    before = weights(run_variants(variant=[]))
    torch.manual_seed(12345)
    assert weights(run_variants(variant=[], where="again")) == before


@pytest.mark.parametrize("step", [5, 15, 20])
def test_all_variants_go_on_from_one_checkpoint_to_the_same_bits(
    step: int, all_of_them: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(all_of_them, run)
    for path in checkpoint.found(run / "checkpoints"):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "variants" / "noisy" / "sae")
    resumed = command("run", "--resume", run)
    assert resumed.code == 0, resumed.err
    for variant in VARIANTS:
        assert same(run / "variants" / variant["name"], all_of_them / "variants" / variant["name"])
    assert not leftovers(run)


def test_other_variants_than_the_checkpoints_are_refused(
    run_variants: Callable, command: Callable[..., Outcome]
) -> None:
    run = run_variants("base", "wide")
    (run / "summary.json").unlink()
    written = (run / "run.toml").read_text(encoding="utf-8")
    for text, now, words in (
        ("d_sae = 96", "d_sae = 95", ("variant.wide.architecture.d_sae was 96 and is now 95",)),
        ('name = "wide"', 'name = "broad"', ("variant was 'base, wide' and is now 'base, broad'",)),
        ("tokens = 1280", "tokens = 640", ("training.tokens was 1280 and is now 640",)),
    ):
        (run / "run.toml").write_text(written.replace(text, now), encoding="utf-8")
        done = command("run", "--resume", run)
        assert done.code == 2
        done.says("another configuration", *words)


def test_a_variants_directory_is_not_resumed_by_itself(run_variants: Callable, command: Callable[..., Outcome]) -> None:
    run = run_variants("base", "wide")
    done = command("run", "--resume", run / "variants" / "wide")
    assert done.code == 2
    done.says("is a variant of the run", f"--resume {run}")


def test_activations_are_harvested_once(run_variants: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many batches and passes over the held-out documents as one SAE needs."""
    batches, passes = [], []
    step, blocks = ShuffledBatches.__next__, TextSource.blocks

    def counted_step(self: ShuffledBatches) -> Any:
        batches.append(1)
        return step(self)

    def counted_blocks(self: TextSource, split: str, **arguments: Any) -> Any:
        passes.append(split)
        return blocks(self, split, **arguments)

    monkeypatch.setattr(ShuffledBatches, "__next__", counted_step)
    monkeypatch.setattr(TextSource, "blocks", counted_blocks)
    run_variants(analyzer=[])
    assert len(batches) == STEPS
    assert passes == ["train", "train", "held_out"]  # the sample that sets the scale, training, evaluation


def test_what_lies_where(run_variants: Callable) -> None:
    run = run_variants("base", "wide")
    assert {path.name for path in run.iterdir()} == {
        "run.toml", "provenance.json", "checkpoints", "variants", "report.html", "summary.json", "SHA256SUMS"
    }  # fmt: skip
    assert {path.name for path in (run / "variants").iterdir()} == {"base", "wide"}
    for name in ("base", "wide"):
        assert {path.name for path in (run / "variants" / name).iterdir()} == {
            "run.toml", "provenance.json", "metrics.jsonl", "sae", "analysis", "report.html", "summary.json", "SHA256SUMS"
        }  # fmt: skip
    plain = run_variants(where="plain", variant=[])
    assert {path.name for path in plain.iterdir()} == {
        "run.toml", "provenance.json", "checkpoints", "metrics.jsonl", "sae", "analysis", "report.html", "summary.json",
        "SHA256SUMS",
    }  # fmt: skip
    assert json.loads((plain / "summary.json").read_text())["variants"] == {}


def test_the_summary_holds_each_variants_own(run_variants: Callable) -> None:
    run = run_variants("base", "other")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["variants"]) == ["base", "other"]
    for name, own in summary["variants"].items():
        assert own == json.loads((run / "variants" / name / "summary.json").read_text(encoding="utf-8"))
        assert own["run"] == f"run/{name}"
        assert own["metrics"]["explained_variance"] is not None
        assert own["analysis"]["features"]
    assert list(summary["variants"]["other"]["losses"]) == ["mse", "noisy"]
    assert summary["variants"]["other"]["sae"] == {"architecture": "standard", "d_in": 32, "d_sae": 128, "calibrated": {}}
    # The run has no SAE of its own: what stands at the top is what all have in common.
    assert summary["sae"] == {"architecture": None, "d_in": 32, "d_sae": None, "calibrated": {}}
    assert summary["metrics"] == summary["analysis"] == summary["losses"] == {}
    assert summary["tokens"] == STEPS * 64


def test_variants_in_python(run_file: Callable[..., Path], tmp_path: Path) -> None:
    file = run_file(variant=[{"name": "a"}, {"name": "b", "architecture": {"d_sae": 32}}])
    run = saekit.run(file, directory=tmp_path / "run", overrides={"variant.b.architecture.k": 2})
    assert list(run.variants) == ["a", "b"]
    sae = saekit.load_sae(run.variants["b"].directory / "sae")
    assert (sae.d_sae, sae.options()["k"]) == (32, 2)
    assert run.variants["b"].directory == run.directory / "variants" / "b"
    assert run.variants["b"].summary == run.summary["variants"]["b"]
    assert run.variants["b"].variants == {}


# --- faults ------------------------------------------------------------------------------------------------------

FAULTS = {
    "callback": listener_plugin("callback", "odd", "@hookimpl\ndef step_ended(self, number):\n    1 / 0"),
    "callback at the start": listener_plugin("callback", "odd", "@hookimpl\ndef run_started(self):\n    1 / 0"),
    "loss": "from saekit import Component, hookimpl\ndef odd(step):\n    1 / 0\n@hookimpl\ndef saekit_losses():\n"
    "    yield Component('odd', odd)\n",
    "metric": "from saekit import Component, hookimpl\nclass Odd:\n    def update(self, step):\n        1 / 0\n"
    "    def compute(self):\n        return {}\n@hookimpl\ndef saekit_metrics():\n    yield Component('odd', Odd)\n",
    "analyzer": "from saekit import Component, hookimpl\nclass Odd:\n    def __call__(self, context):\n        1 / 0\n"
    "@hookimpl\ndef saekit_analyzers():\n    yield Component('odd', Odd)\n",
}


@pytest.mark.parametrize("which", FAULTS)
def test_a_failure_says_which_variant_it_is_of(
    which: str, command: Callable[..., Outcome], run_file: Callable[..., Path], plugin_file: Callable, tmp_path: Path
) -> None:
    kind = which.split()[0]
    broken = {"name": "broken", kind: [{"use": "odd"}]}
    done = command(
        "run", run_file(variant=[{"name": "sound"}, broken]), "--plugin", plugin_file("odd", FAULTS[which]),
        "--directory", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 3
    done.says("variant 'broken': ", f"{kind} 'odd'", "ZeroDivisionError")
    assert "'sound'" not in done.err


def test_a_loss_that_is_not_finite_names_its_variant(
    command: Callable[..., Outcome], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    wild = {"name": "wild", "loss": {"mse": {"weight": 1e38}}, "training": {"lr": 1e30, "clip": 0.0}}
    done = command("run", run_file(variant=[{"name": "calm"}, wild]), "--directory", tmp_path / "run")
    assert done.code == 1
    done.says("variant 'wild': ")


def test_a_tracker_that_fails_is_dropped_for_its_variant_alone(
    command: Callable[..., Outcome], run_file: Callable[..., Path], plugin_file: Callable, tmp_path: Path
) -> None:
    methods = """
    def __init__(self, *, fails: bool = False):
        self.fails, self.heard = fails, []
    @hookimpl
    def run_started(self, run):
        self.path = run.directory.path / "heard"
    @hookimpl
    def step_ended(self, trainer, number):
        if self.fails and number == 3:
            raise ValueError("no room")
        with self.path.open("a") as file:
            file.write(f"{trainer.variant} {number}\\n")
    """
    plugin = plugin_file("odd", listener_plugin("tracker", "odd", methods))
    variants = [{"name": "a", "tracker": {"odd": {"fails": True}}}, {"name": "b"}]
    run = tmp_path / "run"
    file = run_file(variant=variants, tracker=[{"use": "odd"}])
    done = command("run", file, "--plugin", plugin, "--directory", run, "--json")
    assert done.code == 0, done.err
    heard = {name: (run / "variants" / name / "heard").read_text().splitlines() for name in ("a", "b")}
    assert heard == {"a": [f"a {n}" for n in range(3)], "b": [f"b {n}" for n in range(STEPS)]}
    summary = json.loads(done.out)
    (warning,) = [w for w in summary["warnings"] if "no room" in w]
    assert warning.startswith("variant 'a': tracker 'odd'")
    assert [w for w in summary["variants"]["a"]["warnings"] if "no room" in w] == [
        warning.removeprefix("variant 'a': ")
    ]
    assert not any("no room" in w for w in summary["variants"]["b"]["warnings"])


def test_trackers_write_where_their_variant_lies(
    command: Callable[..., Outcome], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    file = run_file(variant=[{"name": "a"}, {"name": "b"}], tracker=[{"use": "tensorboard"}])
    assert command("run", file, "--directory", run).code == 0
    for name in ("a", "b"):
        assert len(list((run / "variants" / name / "tensorboard").glob("events.*"))) == 1
    assert not (run / "tensorboard").exists()


def test_a_mistake_that_shows_late_leaves_no_directory_behind(
    command: Callable[..., Outcome], run_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Not before the weights are read is it known that they are of another width; the same command works once mended."""
    assert command("run", run_file(), "--directory", tmp_path / "first").code == 0
    start = {"name": "b", "architecture": {"from": str(tmp_path / "first" / "sae"), "d_sae": 63}}
    done = command("run", run_file(variant=[{"name": "a"}, start]), "--directory", tmp_path / "run")
    assert done.code == 2
    done.says("variant 'b': architecture.d_sae", "63", "64")
    assert not (tmp_path / "run").exists()


# --- showing them ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tiny_gpt2: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shown")
    variants = [{"name": "narrow"}, {"name": "wide", "architecture": {"d_sae": 128}, "loss": {"mse": {"weight": 2.0}}}]
    (place / "run.toml").write_text(tomli_w.dumps(tiny_table(tiny_gpt2, text_file, variant=variants)), encoding="utf-8")
    return saekit.run(place / "run.toml", directory=place / "run").directory


@pytest.fixture
def finished(shown: Path, tmp_path: Path) -> Path:
    """The directory of a finished run of two variants."""
    return Path(shutil.copytree(shown, tmp_path / "run"))


def test_compare_shows_the_variants_of_a_run(finished: Path, command: Callable[..., Outcome]) -> None:
    document = json.loads(command("compare", finished, "--json", "--metric", "explained_variance").out)
    assert [side["run"] for side in document["runs"]] == ["run/narrow", "run/wide"]
    assert [side["differences"] for side in document["runs"]] == [
        {"architecture.d_sae": 64, "loss.mse.weight": 1.0},
        {"architecture.d_sae": 128, "loss.mse.weight": 2.0},
    ]
    assert document["warnings"] == []
    one = json.loads((finished / "variants" / "wide" / "summary.json").read_text())["metrics"]["explained_variance"]
    assert document["runs"][1]["values"]["explained_variance"] == one


def test_compare_takes_a_variant_as_a_run(finished: Path, command: Callable[..., Outcome], tmp_path: Path) -> None:
    done = command("compare", finished / "variants" / "wide", finished, "--html", tmp_path / "page.html")
    assert done.code == 0, done.err
    assert done.out.count("run/wide") == 2 and done.out.count("run/narrow") == 2  # values, and what differs
    assert "run/narrow" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_report_shows_the_variants_and_leads_to_theirs(finished: Path, command: Callable[..., Outcome]) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    for name in ("narrow", "wide"):
        assert f'href="variants/{name}/report.html"' in text
        assert (finished / "variants" / name / "report.html").is_file()
    assert "Warnings" not in text  # nothing is missed, metrics.jsonl at the top neither
    shutil.rmtree(finished / "variants" / "wide" / "analysis", ignore_errors=True)
    (finished / "variants" / "wide" / "summary.json").unlink()
    assert command("report", finished).code == 0
    assert "wide: summary.json is missing" in (finished / "report.html").read_text(encoding="utf-8")


def test_the_terminal_shows_a_row_for_each(finished: Path, command: Callable[..., Outcome]) -> None:
    err = command("run", "--resume", finished).err
    assert "2 variants" in err
    rows = {line.split()[1]: line.split()[2:4] for line in err.splitlines() if "topk" in line}
    assert rows == {"narrow": ["topk", "64"], "wide": ["topk", "128"]}


def test_an_interrupted_run_of_variants_can_be_looked_at(
    run_file: Callable[..., Path], command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saekit.runner.run import Run

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_evaluate", stop)
    run = tmp_path / "run"
    with contextlib.suppress(saekit.SaekitError):
        saekit.run(run_file(variant=[{"name": "b"}, {"name": "a"}]), directory=run)
    assert command("report", run).code == 0
    document = json.loads(command("compare", run, "--json").out)
    assert {side["run"]: side["state"] for side in document["runs"]} == {
        "run/a": "20 of 20 steps",
        "run/b": "20 of 20 steps",
    }
