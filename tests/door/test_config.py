"""The run file: overrides, names on the command line, the fixed point run.toml, schedules, and every refusal."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from saekit.api import _toml_value
from saekit.config import (
    IDLE,
    VARIES,
    ArchitectureUse,
    EvaluationConfig,
    LossUse,
    RunConfig,
    TrainingConfig,
    Use,
    Variant,
    use_model,
)
from saekit.errors import UsageError
from saekit.kinds import KINDS, LISTS, SECTIONS, SINGLES
from saekit.plugins import Registry
from saekit.run_file import override, parse_config, parse_override, parse_use, parse_value, read_toml, table_of
from saekit.runner.plan import make_plan
from saekit.runner.resume import decisive
from saekit.schedules import Cosine, Linear, Steps, WarmupDecay, extreme_steps, value_at
from saekit.variants import SHARED_SECTIONS, check_variant

BASE: dict[str, Any] = {
    "source": {"use": "text", "hook_point": "blocks.0.hook_out"},
    "architecture": {"use": "topk", "d_sae": 64},
    "loss": [{"use": "mse"}, {"use": "plugin.l1", "name": "sparse", "weight": 2.0}],
}


def changed(*assignments: str) -> dict[str, Any]:
    table = copy.deepcopy(BASE)
    for assignment in assignments:
        override(table, parse_override(assignment))
    return table


def refused(table: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        parse_config(table, "file.toml")
    return str(caught.value)


# --- overrides ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1_000_000", 1_000_000),
        ("1e-3", 1e-3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('{schedule = "linear", to = 1.0, steps = 6}', {"schedule": "linear", "to": 1.0, "steps": 6}),
        ('"quoted"', "quoted"),
        ("topk", "topk"),
        ("a/path with spaces.txt", "a/path with spaces.txt"),
        ("2026-11-20", "2026-11-20"),
        ("1\nother = 2", "1\nother = 2"),
        ("", ""),
    ],
)
def test_a_value_is_toml_where_it_is_toml(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_an_override_reaches_sections_entries_and_new_keys() -> None:
    table = changed("training.lr=1e-4", "loss.mse.weight=3", "loss.sparse.weight=0.5", "source.context=32", "recipe=x")
    config = parse_config(table, "file.toml")
    assert config.training.lr == 1e-4
    assert [entry.weight for entry in config.loss] == [3.0, 0.5]
    assert config.source.options == {"hook_point": "blocks.0.hook_out", "context": 32}
    assert config.recipe == "x"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("training.lr", ("key=value", "training.lr=1e-3")),
        ("=3", ("key=value",)),
        ("loss.sparze.weight=2", ("no loss called 'sparze'", "Did you mean 'sparse'?", "mse, sparse")),
        ("callback.resample.every=2", ("no callback called 'resample'", "none")),
        ("loss.mse=2", ("loss.mse.weight=2",)),
        ("source.use.deeper=1", ("source.use is a value",)),
    ],
)
def test_a_wrong_override_says_what_to_write(assignment: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        changed(assignment)
    assert assignment in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_names_on_the_command_line_add_to_lists_and_replace_single_sections() -> None:
    table = copy.deepcopy(BASE)
    table_of(["auxk:k=4", "hoyer"], "loss", table)
    table_of(["standard:decoder_norm=free"], "architecture", table)
    table_of(["organism"], "source", table)
    config = parse_config(table, "file.toml")
    assert [entry.label for entry in config.loss] == ["mse", "sparse", "auxk", "hoyer"]
    assert config.loss[2].options == {"k": 4}
    assert (config.architecture.use, config.architecture.d_sae) == ("standard", 64)
    assert config.architecture.options == {"decoder_norm": "free"}
    assert config.source.options == {}


# --- NAME:key=value ----------------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
scalars = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), texts)
values = st.one_of(scalars, st.lists(scalars, max_size=4), st.dictionaries(names, scalars, max_size=3))


@settings(max_examples=200)
def inline(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {inline(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return tomli_w.dumps({"value": value}).partition("=")[2].strip()


@given(name=names, options=st.dictionaries(names, values, max_size=4))
def test_parse_use_gives_back_what_was_written(name: str, options: dict[str, Any]) -> None:
    assume("use" not in options)
    text = f"{name}:" + ",".join(f"{key}={inline(value)}" for key, value in options.items())
    assert parse_use(text) == {"use": name, **options}


@given(value=values)
def test_an_override_in_python_is_what_the_command_line_reads(value: Any) -> None:
    for read in (_toml_value("key", value), parse_value(inline(value))):
        assert read == value
        assert type(read) is type(value)


@pytest.mark.parametrize("value", [None, [1, None], {"a": None}, object(), {1, 2}])
def test_an_override_in_python_that_toml_lacks_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="cannot be written in a run file"):
        _toml_value("key", value)


@settings(max_examples=100)
@given(word=st.from_regex(r"[A-Za-z_/.][A-Za-z0-9_/.'\"\[\]{} -]{0,12}", fullmatch=True), number=st.integers())
def test_a_plain_word_needs_no_quotes(word: str, number: int) -> None:
    """A path with a bracket or an apostrophe inside is a path; brackets and quotes count where a value begins."""
    assume(parse_value(word.strip()) == word.strip())
    assert parse_use(f"text:data={word},context={number}") == {"use": "text", "data": word.strip(), "context": number}


@pytest.mark.parametrize("text", ["l1:weight", "l1:weight=[1,2", 'text:data="a,b', "l1:=", "text:data='x"])
def test_half_an_option_is_refused_with_the_form(text: str) -> None:
    if text == "l1:=":
        assert parse_use(text) == {"use": "l1", "": ""}  # refused by name when the options are checked
        return
    with pytest.raises(UsageError, match="key=value") as caught:
        parse_use(text)
    assert text in str(caught.value)


# --- run.toml ----------------------------------------------------------------------------------------------------

schedules = st.one_of(
    st.builds(
        lambda to, steps, start, begin: {"schedule": "linear", "to": to, "steps": steps, "start_value": start, "begin": begin},
        st.floats(-1e6, 1e6),
        st.integers(1, 10**6),
        st.floats(-1e6, 1e6),
        st.integers(0, 10**6),
    ),
    st.builds(lambda to, warmup: {"schedule": "cosine", "to": to, "warmup": warmup}, st.floats(0, 10), st.integers(0, 99)),
    st.builds(lambda decay: {"schedule": "warmup_decay", "decay": decay}, st.floats(0, 1)),
    st.builds(lambda a, b: {"schedule": "steps", "values": [a, b], "at_steps": [5]}, st.floats(0, 1), st.floats(0, 1)),
)


@st.composite
def run_tables(draw: st.DrawFn) -> dict[str, Any]:
    def entries(section: str) -> list[dict[str, Any]]:
        labels = draw(st.lists(names, max_size=3, unique=True))
        made = []
        for label in labels:
            entry = {**draw(st.dictionaries(names, values, max_size=3)), "use": draw(names), "name": label}
            entry.pop("weight", None)
            if section == "loss" and draw(st.booleans()):
                entry["weight"] = draw(st.one_of(st.floats(-1e9, 1e9), schedules))
            made.append(entry)
        return made

    architecture = {k: v for k, v in draw(st.dictionaries(names, values, max_size=3)).items() if k not in ("d_sae", "name", "from")}
    source = {k: v for k, v in draw(st.dictionaries(names, values, max_size=3)).items() if k != "name"}
    return {
        "source": {**source, "use": draw(names)},
        "architecture": {**architecture, "use": draw(names), "d_sae": draw(st.integers(1, 10**9))},
        **{section: entries(section) for section in ("loss", "callback", "metric", "analyzer", "tracker")},
        "training": {"lr": draw(st.one_of(st.floats(0, 1), schedules)), "seed": draw(st.integers(0, 2**62))},
        "plugins": draw(st.lists(texts, max_size=2)),
    }


@settings(max_examples=100)
@given(table=run_tables())
def test_run_toml_is_a_fixed_point(table: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is written says the same as what was read, to the last option, infinities among them."""
    config = parse_config(table, "file.toml")
    path = tmp_path_factory.getbasetemp() / "fixed.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    again = parse_config(read_toml(path), "run.toml")
    assert again == config
    assert again.to_toml() == config.to_toml()


def test_the_table_of_sections_is_that_of_the_run_file() -> None:
    """Each section is a key of the run file of the right shape, and of a variant unless variants share it."""
    models = {name: use_model(name) for name in SECTIONS}
    for name, section in SECTIONS.items():
        entry: Any = {"use": "x"}
        config = RunConfig.model_validate({**BASE, name: [entry] if section.many else entry})
        [read] = getattr(config, name) if section.many else [getattr(config, name)]
        assert type(read) is models[name]
    holders = {name for name, info in RunConfig.model_fields.items() if "Use" in str(info.annotation)}
    assert holders == set(SECTIONS)
    assert set(Variant.model_fields) == {*SECTIONS, "name", "training"} - set(SHARED_SECTIONS)
    assert {section.kind for section in SECTIONS.values()} == set(KINDS) - {"recipe"}


def test_a_key_without_a_mark_is_shared_by_variants_and_fixed_on_a_resume() -> None:
    """So a key that somebody adds and forgets to mark is refused, not silently ignored."""
    for key, info in TrainingConfig.model_fields.items():
        variant = {"name": "v", "training": {key: info.get_default(call_default_factory=True)}}
        if VARIES in info.metadata:
            check_variant(variant)
        else:
            with pytest.raises(UsageError, match=f"training.{key}: is the same for all variants"):
                check_variant(variant)
    config = parse_config(copy.deepcopy(BASE), "run.toml")
    decides = decisive(config.model_copy(update={"training": TrainingConfig(data_seed=1, threads=1)}), {})
    for key, info in TrainingConfig.model_fields.items():
        assert any(f"{name}.".startswith(f"training.{key}.") for name in decides) == (IDLE not in info.metadata), key


def test_every_key_of_the_run_file_is_described() -> None:
    sections = (*SINGLES, *LISTS, "training", "evaluation")
    for model in (RunConfig, Use, ArchitectureUse, LossUse, TrainingConfig, EvaluationConfig):
        for name, field in model.model_fields.items():
            assert field.description or name in sections, f"{model.__name__}.{name}"


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"losses": []}, ("losses", "no such key", "Did you mean 'loss'?")),
        ({"training": {"tokns": 3}}, ("training.tokns", "no such key", "'tokens'")),
        ({"training": {"batch_size": "many"}}, ("training.batch_size", "'many'")),
        ({"training": {"batch_size": 0}}, ("training.batch_size", "greater than 0")),
        ({"training": {"batch_size": 2.5}}, ("training.batch_size", "2.5")),
        ({"training": {"seed": True}}, ("training.seed", "true", "number")),
        ({"training": {"lr": math.nan}}, ("training.lr", "finite")),
        ({"training": {"clip": math.inf}}, ("training.clip", "finite")),
        ({"training": {"betas": [0.9, 1.0]}}, ("training.betas.1", "less than 1")),
        ({"training": {"betas": [0.9]}}, ("training.betas.1", "required")),
        ({"training": {"precision": "fp16"}}, ("training.precision", "'fp32' or 'bf16'")),
        ({"training": 5}, ("training", "not a table", "[training]")),
        ({"evaluation": {"tokens": -1}}, ("evaluation.tokens", "greater than 0")),
        ({"source": "text"}, ("source", "not a table", "[source]")),
        ({"source": {"hook_point": "x"}}, ("source.use", "required")),
        ({"architecture": {"use": "topk", "d_sae": 0}}, ("architecture.d_sae", "greater than 0")),
        ({"architecture": {"use": ""}}, ("architecture.use",)),
        ({"loss": {"use": "mse"}}, ("loss", "[[loss]]")),
        ({"loss": ["mse"]}, ("loss", "[[loss]]")),
        ({"loss": [{"use": "mse"}, {"use": "x.mse"}]}, ("loss", "two entries", "'mse'", "name =")),
        ({"loss": [{"use": "mse", "weight": "heavy"}]}, ("loss.mse.weight", "'heavy'")),
        ({"loss": [{"use": "mse", "weight": math.inf}]}, ("loss.mse.weight", "finite")),
        ({"loss": [{"use": "mse", "weight": False}]}, ("loss.mse.weight", "false", "number")),
        ({"metric": [{"use": "l0", "name": "../l0"}]}, ("metric.../l0.name", "pattern")),
        ({"plugins": "my.py"}, ("plugins", "not a list")),
    ],
)
def test_what_a_run_file_may_not_say(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    message = refused({**copy.deepcopy(BASE), **changes})
    for word in ("file.toml", *words):
        assert word in message, message


@pytest.mark.parametrize("section", ["source", "architecture"])
def test_a_missing_section_says_what_to_add(section: str) -> None:
    message = refused({k: v for k, v in BASE.items() if k != section})
    assert f"{section}: is missing" in message
    assert f"[{section}]" in message


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"schedule": "linar", "to": 1}, ("neither a number nor", '"linear"')),
        ({"to": 1.0}, ("neither a number nor", '"linear"')),
        ({"schedule": "linear", "to": 1.0}, ("steps", "required")),
        ({"schedule": "linear", "to": 1.0, "steps": 0}, ("steps", "greater than 0")),
        ({"schedule": "linear", "to": math.nan, "steps": 2}, ("to", "finite")),
        ({"schedule": "linear", "to": 1.0, "stepz": 3, "steps": 1}, ("stepz", "no such key", "'steps'")),
        ({"schedule": "cosine", "warmup": -1}, ("warmup", "greater than or equal to 0")),
        ({"schedule": "warmup_decay", "decay": 1.5}, ("decay", "less than or equal to 1")),
        ({"schedule": "steps", "values": []}, ("values", "at least 1")),
        ({"schedule": "steps", "values": [1.0], "at_steps": [3]}, ("one value more",)),
        ({"schedule": "steps", "values": [1.0, 2.0, 3.0], "at_steps": [5, 3]}, ("must rise",)),
        ({"schedule": "steps", "values": [1.0, 2.0, 3.0], "at_steps": [5, 5]}, ("must rise",)),
        ({"schedule": "steps", "values": [1.0, 2.0], "at_steps": [-5]}, ("at_steps", "greater than or equal to 0")),
    ],
)
@pytest.mark.parametrize("key", ["training.lr", "loss.mse.weight"])
def test_a_wrong_schedule_names_its_key_once(key: str, schedule: dict[str, Any], words: tuple[str, ...]) -> None:
    table = copy.deepcopy(BASE)
    if key == "training.lr":
        table["training"] = {"lr": schedule}
    else:
        table["loss"][0]["weight"] = schedule
    message = refused(table)
    assert message.startswith(f"file.toml: {key}"), message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[source\nuse = 3", ("not valid TOML", "line 1")),
        (b"use = '\xff'", ("not UTF-8", "byte 7", "Save it as UTF-8")),
    ],
)
def test_an_unreadable_file_is_named_with_the_place(content: bytes, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_toml(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


# --- schedules ---------------------------------------------------------------------------------------------------

numbers = st.floats(-1e3, 1e3)
totals = st.integers(1, 5000)


def between(value: float, *ends: float) -> bool:
    slack = 1e-9 * max(1.0, *map(abs, ends))
    return min(ends) - slack <= value <= max(ends) + slack


@given(start=numbers, to=numbers, steps=st.integers(1, 1000), begin=st.integers(0, 1000), step=st.integers(0, 5000))
def test_linear_runs_from_one_end_to_the_other(start: float, to: float, steps: int, begin: int, step: int) -> None:
    schedule = Linear(schedule="linear", to=to, steps=steps, start_value=start, begin=begin)
    assert between(schedule.at(step, 1), start, to)
    assert schedule.at(begin, 1) == start
    assert schedule.at(begin + steps, 1) == pytest.approx(to, abs=1e-9)
    assert schedule.at(begin + steps + 7, 1) == pytest.approx(to, abs=1e-9)
    if begin:
        assert schedule.at(begin - 1, 1) == start
    assert schedule.at(begin + 1, 1) - start == pytest.approx((to - start) / steps, abs=1e-9)


@given(to=numbers, end=numbers, warmup=st.integers(0, 100), total=totals, data=st.data())
def test_cosine_warms_up_peaks_and_lands_on_its_end(to: float, end: float, warmup: int, total: int, data: Any) -> None:
    schedule = Cosine(schedule="cosine", to=to, warmup=warmup, end=end)
    step = data.draw(st.integers(0, total - 1))
    assert between(schedule.at(step, total), 0.0, to, end)
    if 0 < warmup <= total:
        assert schedule.at(warmup - 1, total) == pytest.approx(to)
        assert schedule.at(0, total) == pytest.approx(to / warmup)
    if warmup < total:
        assert schedule.at(warmup, total) == pytest.approx(to)
    if warmup < total - 1:
        assert schedule.at(total - 1, total) == pytest.approx(end, abs=1e-9)
        middle = (warmup + total - 1) / 2
        if middle == int(middle):
            assert schedule.at(int(middle), total) == pytest.approx((to + end) / 2, abs=1e-9)


@given(to=numbers, end=numbers, warmup=st.integers(0, 50), decay=st.floats(0, 1), total=totals, data=st.data())
def test_warmup_decay_holds_between_its_ramps(to: float, end: float, warmup: int, decay: float, total: int, data: Any) -> None:
    schedule = WarmupDecay(schedule="warmup_decay", to=to, warmup=warmup, decay=decay, end=end)
    step = data.draw(st.integers(0, total - 1))
    value = schedule.at(step, total)
    assert between(value, 0.0, to, end)
    falling = decay * total
    if warmup <= step and total - step >= falling:
        assert value == to
    if step < warmup:
        assert value == pytest.approx(to * (step + 1) / warmup)
    if falling >= 1 and warmup <= total - 1:
        # The ramp would reach `end` at the step after the last.
        assert schedule.at(total - 1, total) - end == pytest.approx((to - end) / falling, abs=1e-6)


@given(boundaries=st.lists(st.integers(0, 1000), max_size=5, unique=True), step=st.integers(0, 1100), data=st.data())
def test_steps_holds_each_value_from_its_boundary_on(boundaries: list[int], step: int, data: Any) -> None:
    boundaries.sort()
    pieces = data.draw(st.lists(numbers, min_size=len(boundaries) + 1, max_size=len(boundaries) + 1))
    schedule = Steps(schedule="steps", values=pieces, at_steps=boundaries)
    edges = [-1, *boundaries, 10**9]
    piece = next(i for i, (low, high) in enumerate(itertools.pairwise(edges)) if max(low, 0) <= step < high)
    assert schedule.at(step, 1) == pieces[piece]


def test_a_plain_number_never_changes() -> None:
    assert {value_at(2, step, 10) for step in range(10)} == {2}


warmups = st.integers(0, 120)
schedules = st.one_of(
    numbers,
    st.builds(Linear, schedule=st.just("linear"), to=numbers, steps=st.integers(1, 120), start_value=numbers, begin=warmups),
    st.builds(Cosine, schedule=st.just("cosine"), to=numbers, warmup=warmups, end=numbers),
    st.builds(
        WarmupDecay, schedule=st.just("warmup_decay"), to=numbers, warmup=warmups, decay=st.floats(0, 1), end=numbers
    ),
    st.lists(st.tuples(st.integers(0, 120), numbers), min_size=1, max_size=5, unique_by=lambda pair: pair[0]).map(
        lambda pairs: Steps(schedule="steps", at_steps=sorted(p[0] for p in pairs)[1:], values=[p[1] for p in pairs])
    ),
)


@settings(max_examples=500)
@given(value=schedules, total=st.integers(1, 100))
def test_the_extremes_are_those_of_every_step(value: Any, total: int) -> None:
    every = [value_at(value, step, total) for step in range(total)]
    lowest, highest = extreme_steps(value, total)
    assert (every[lowest], every[highest]) == (min(every), max(every))


def test_a_plan_does_not_grow_with_the_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    at = WarmupDecay.at
    monkeypatch.setattr(WarmupDecay, "at", lambda self, step, total: asked.append(step) or at(self, step, total))
    table = changed("training.tokens=1_000_000_000", "architecture.k=4", 'training.lr={schedule = "warmup_decay", warmup = 1000}')
    table |= {"source": {"use": "synthetic", "d_in": 8, "n_features": 16, "probability": 0.1}, "loss": [{"use": "mse"}]}
    plan = make_plan(parse_config(table, "file.toml"), Registry())
    assert plan.total_steps > 200_000
    assert 0 < len(asked) < 20
