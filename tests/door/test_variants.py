"""`[[variant]]` in a run file: what it changes, what it may not, and how `-o` reaches it."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Outcome

from saekit.config import RunConfig
from saekit.errors import UsageError
from saekit.plugins import Registry
from saekit.run_file import override, parse_config, parse_override
from saekit.runner.plan import plan_run
from saekit.variants import run_configs

FILE = """
[source]
use = "synthetic"
d_in = 16
n_features = 32
length = 64

[architecture]
use = "topk"
d_sae = 64
k = 4

[[loss]]
use = "mse"

[[loss]]
use = "l1"
weight = 0.5

[training]
tokens = 1000
batch_size = 100
lr = 1e-3
"""


def config(*variants: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    table = tomllib.loads(FILE + "".join(f"\n[[variant]]\n{text}\n" for text in variants))
    for assignment in overrides:
        override(table, parse_override(assignment))
    return parse_config(table, "run.toml")


def member(text: str, *overrides: str) -> RunConfig:
    """What a variant called "v" comes to."""
    return run_configs(config(f'name = "v"\n{text}', overrides=overrides))["v"]


def test_without_variants_the_run_is_its_own_only_member() -> None:
    alone = config()
    assert run_configs(alone) == {"": alone}


def test_what_a_variant_does_not_name_is_the_runs() -> None:
    assert member("") == config()


@pytest.mark.parametrize(
    ("text", "differs"),
    [
        ("architecture.d_sae = 128", {"architecture": {"use": "topk", "d_sae": 128, "k": 4}}),
        ('architecture = {use = "topk", k = 8}', {"architecture": {"use": "topk", "d_sae": 64, "k": 8}}),
        # k is an option of topk alone, and is not handed on to another architecture.
        ('architecture = {use = "standard"}', {"architecture": {"use": "standard", "d_sae": 64}}),
        ('loss = [{use = "mse"}]', {"loss": [{"use": "mse", "weight": 1.0}]}),
        ("loss.l1.weight = 2", {"loss": [{"use": "mse", "weight": 1.0}, {"use": "l1", "weight": 2.0}]}),
        ("training.lr = 2e-3", {"training": {"lr": 2e-3}}),
        ('metric = [{use = "l0"}]', {"metric": [{"use": "l0"}]}),
    ],
)
def test_a_variant_changes_what_it_names(text: str, differs: dict[str, Any]) -> None:
    changed = member(text).model_dump(by_alias=True, exclude_none=True)
    same = config().model_dump(by_alias=True, exclude_none=True)
    for section, value in differs.items():
        assert (changed[section] if section != "training" else {"lr": changed[section]["lr"]}) == value
    for section in same.keys() - differs.keys() - {"variant"}:
        assert changed[section] == same[section]


def test_a_seed_of_its_own_leaves_the_data_in_the_runs_order() -> None:
    training = member("training.seed = 7").training
    assert (training.seed, training.data_seed, training.order_seed) == (7, 0, 0)
    assert member("training.lr = 1.0").training.data_seed is None


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("variant.v.architecture.k=9", lambda c: c.architecture.options["k"]),
        ("variant.v.training.lr=9", lambda c: c.training.lr),
        ("variant.v.loss.l1.weight=9", lambda c: c.loss[1].weight),
    ],
)
@pytest.mark.parametrize("text", ["", 'loss = [{use = "mse"}, {use = "l1", weight = 3.0}]'])
def test_an_override_reaches_into_a_variant(text: str, assignment: str, read: Callable) -> None:
    assert read(member(text, assignment)) == 9
    assert read(config(f'name = "v"\n{text}', overrides=(assignment,))) != 9


def test_an_override_of_the_run_reaches_every_variant_that_has_no_value_of_its_own() -> None:
    both = run_configs(config('name = "a"', 'name = "b"\nloss.l1.weight = 3', overrides=("loss.l1.weight=9",)))
    assert [own.loss[1].weight for own in both.values()] == [9, 3]


MISTAKES = {
    "tokens": ("training.tokens = 5", ("variant.v.training.tokens", "same for all variants", "a separate run")),
    "batch": ("training.batch_size = 5", ("variant.v.training.batch_size", "same for all variants")),
    "normalize": ("training.normalize = false", ("variant.v.training.normalize", "same for all variants")),
    "the order": ("training.data_seed = 5", ("variant.v.training.data_seed", "same for all variants")),
    "the source": ("source.d_in = 5", ("variant.v.source", "same for all variants")),
    "held out": ("evaluation.tokens = 5", ("variant.v.evaluation", "same for all variants")),
    "another section": ('directory = "x"', ("variant.v.directory", "no such key", "architecture", "tracker")),
    "a misspelt key": ("training.lrr = 5", ("variant.v.training.lrr", "no such key", "'lr'")),
    "no such loss": ("loss.msee.weight = 5", ("variant.v.loss.msee", "no loss called 'msee'", "mean 'mse'", "mse, l1")),
    "a number": ("loss = 5", ("variant.v.loss", "neither a list of tables nor a table", "loss.NAME.KEY = value")),
    "no table": ("architecture = 5", ("variant.v.architecture", "is not a table")),
    "a wrong value": ("training.lr = [1]", ("variant.v.training.lr",)),
    "true": ("training.seed = true", ("variant.v.training.seed", "true", "a number is wanted")),
    "no use": ("loss = [{weight = 1.0}]", ("variant.v.loss", "use", "required")),
    "two of a name": ('loss = [{use = "l1"}, {use = "l1"}]', ("variant.v.loss", "two entries are called 'l1'")),
}


@pytest.mark.parametrize("which", MISTAKES)
def test_a_mistake_in_a_variant_says_file_key_and_fix(which: str) -> None:
    text, words = MISTAKES[which]
    with pytest.raises(UsageError) as caught:
        member(text)
    for word in ("run.toml: ", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", ".hidden", "a.b", "-a", "x" * 101])
def test_a_name_that_is_no_directory_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"run\.toml: variant\..*name"):
        config(f'name = "{name}"')


@pytest.mark.parametrize("twin", ["wide", "WIDE"])
def test_two_variants_of_a_name_are_refused(twin: str) -> None:
    with pytest.raises(UsageError, match="two are called 'wide'"):
        config('name = "wide"', f'name = "{twin}"')


def test_variants_that_are_no_list_are_refused() -> None:
    with pytest.raises(UsageError, match=r"Write each entry as \[\[variant\]\].* name = "):
        parse_config({**tomllib.loads(FILE), "variant": {"name": "v"}}, "run.toml")


def test_an_override_of_a_variant_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="no variant called 'wdie'.*Did you mean 'wide'"):
        config('name = "wide"', overrides=("variant.wdie.training.lr=1",))


# --- the plan ----------------------------------------------------------------------------------------------------


def test_every_variant_is_planned_and_the_resolved_file_plans_the_same() -> None:
    """With the default components once, whether a variant has a list of its own or the run's."""
    written = config('name = "a"\nmetric = [{use = "cosine"}]', 'name = "b"\nloss.l1.weight = 3\ntraining.seed = 1')
    plan = plan_run(written, Registry())
    assert [one.variant for one in plan.members] == ["a", "b"]
    metrics = [[part.label for part in one.sections["metric"]] for one in plan.members]
    assert metrics == [
        ["explained_variance", "l0", "density", "dead", "cosine"],
        ["explained_variance", "l0", "density", "dead"],
    ]
    again = plan_run(parse_config(tomllib.loads(plan.config.to_toml()), "run.toml"), Registry())
    assert [one.config for one in again.members] == [one.config for one in plan.members]
    assert again.config == plan.config


def test_a_variants_own_file_plans_what_the_variant_does() -> None:
    plan = plan_run(config('name = "a"\narchitecture.k = 2\ntraining.seed = 1\nloss = [{use = "mse"}]'), Registry())
    (one,) = plan.members
    alone = plan_run(parse_config(tomllib.loads(one.config.to_toml()), "run.toml"), Registry())
    assert alone.config == one.config


BAD_PLANS = {
    'loss = [{use = "mze"}]': ("variant 'v': loss.mze", "Did you mean 'mse'"),
    "architecture.k = 0": ("variant 'v': architecture.k",),
    "architecture.kk = 1": ("variant 'v': architecture.kk", "no option 'kk'"),
    'metric = [{use = "ce_recovered"}]': ("variant 'v': metric.ce_recovered", "needs"),
    "loss = []": ("variant 'v': loss: is missing",),
    "training.lr = -1.0": ("variant 'v': training.lr",),
}


@pytest.mark.parametrize("text", BAD_PLANS)
def test_the_plan_checks_every_variant(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_run(config('name = "good"', f'name = "v"\n{text}'), Registry())
    for word in BAD_PLANS[text]:
        assert word in str(caught.value)


def test_only_the_variants_need_to_be_whole() -> None:
    """What stands at the top is their common base: it may lack what each of them gives."""
    table = tomllib.loads(FILE)
    del table["loss"], table["architecture"]["d_sae"], table["architecture"]["k"]
    table["variant"] = [{"name": "v", "loss": [{"use": "mse"}], "architecture": {"d_sae": 32, "k": 2}}]
    plan = plan_run(parse_config(copy.deepcopy(table), "run.toml"), Registry())
    assert plan.members[0].config.architecture.d_sae == 32


def test_a_dry_run_prints_each_variant(command: Callable[..., Outcome], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(FILE + '[[variant]]\nname = "narrow"\n[[variant]]\nname = "wide"\narchitecture.d_sae = 128\n')
    done = command("run", path, "--dry-run")
    assert done.code == 0, done.err
    assert "variant narrow" in done.out and "variant wide" in done.out
    assert done.out.index("d_sae=64") < done.out.index("d_sae=128")
