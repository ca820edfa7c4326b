"""A component that refuses an option names only the option; a run names it by the run file's key, wherever it was raised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from saekit import Component, ComponentError, ComponentOption, OfKind, OptionError, UsageError, hookimpl
from saekit.builtin.architectures.topk import TopK
from saekit.builtin.sources import SyntheticSource
from saekit.errors import under_key
from saekit.plugins import Registry
from saekit.testing.fixtures import D_IN, registry_of
from saekit.testing.tiny import tiny_run


def refuse() -> Any:
    raise OptionError("few", "is too few. Give more.")


class OnBuild:
    def __init__(self, *given: Any, few: int = 0) -> None:
        refuse()


class OnPrepare:
    def __init__(self, *, few: int = 0) -> None: ...
    def prepare(self, context: Any) -> None:
        refuse()

    def __call__(self, step: Any) -> Any: ...
    def measure(self, context: Any) -> Any: ...


class OnCall:
    def __init__(self, *, few: int = 0) -> None: ...
    def __call__(self, *given: Any) -> Any:
        refuse()


class OnPrepareOfMetric(OnPrepare): ...


class OnUpdate(OnPrepare):
    def prepare(self, context: Any) -> None: ...
    def update(self, step: Any) -> None:
        refuse()

    def compute(self) -> Any: ...


class OnCompute(OnUpdate):
    def update(self, step: Any) -> None: ...
    def compute(self) -> Any:
        refuse()


class OnMeasure(OnPrepare):
    def prepare(self, context: Any) -> None: ...
    def measure(self, context: Any) -> Any:
        refuse()


class OnStep:
    def __init__(self, *, few: int = 0) -> None: ...
    @hookimpl
    def step_started(self) -> None:
        refuse()


class PreparingArchitecture(TopK):
    def prepare(self, context: Any) -> None:
        refuse()


class Source(SyntheticSource):
    """Sound, but for the method that a derived class spoils."""

    def __init__(self, *, few: int = 0) -> None:
        super().__init__(d_in=D_IN, n_features=32)


class OnPeek(Source):
    def peek(self) -> Any:
        refuse()


class OnOpen(Source):
    def open(self, **given: Any) -> None:
        refuse()


class OnBlocks(Source):
    def blocks(self, *given: Any, **named: Any) -> Any:
        refuse()


PLACES: list[tuple[str, type]] = [
    ("architecture", OnBuild),
    ("architecture", PreparingArchitecture),
    ("loss", OnBuild),
    ("loss", OnPrepare),
    ("loss", OnCall),
    ("graph_builder", OnBuild),
    ("graph_builder", OnCall),
    ("metric", OnBuild),
    ("metric", OnPrepareOfMetric),
    ("metric", OnUpdate),
    ("metric", OnCompute),
    ("metric", OnMeasure),
    ("analyzer", OnBuild),
    ("analyzer", OnPrepare),
    ("analyzer", OnCall),
    ("callback", OnBuild),
    ("callback", OnStep),
    ("source", OnBuild),
    ("source", OnPeek),
    ("source", OnOpen),
    ("source", OnBlocks),
    ("tracker", OnBuild),
]


AFTER_TRAINING = (OnCall, OnPrepareOfMetric, OnUpdate, OnCompute, OnMeasure)


def section(kind: str) -> tuple[dict[str, Any], str]:
    """The run file's part that names the component, with another name where an entry can have one; and its key."""
    if kind == "architecture":
        return {"architecture": {"use": "picky", "d_sae": 32}}, "architecture"
    if kind == "source":
        return {"source": {"use": "picky"}}, "source"
    if kind == "graph_builder":
        return {"graph": {"use": "picky"}}, "graph"
    mse = [{"use": "mse"}] if kind == "loss" else []
    return {kind: [*mse, {"use": "picky", "name": "other"}]}, f"{kind}.other"


@pytest.mark.parametrize(
    ("kind", "target"), [pytest.param(*place, id=f"{place[0]}-{place[1].__name__}") for place in PLACES]
)
def test_the_key_is_the_run_files(kind: str, target: type, tmp_path: Path) -> None:
    table, key = section(kind)
    with pytest.raises(UsageError) as caught:
        tiny_run(tmp_path / "run", registry=registry_of(**{kind: Component("picky", target)}), **table)
    # A metric or an analyzer fails alone, and is told of when everything else is written.
    message, *then = str(caught.value).splitlines()
    assert message == f"{key}.few: is too few. Give more."
    assert bool(then) == (target in AFTER_TRAINING and kind in ("metric", "analyzer"))


def test_the_variant_stands_before_the_key(tmp_path: Path) -> None:
    registry = registry_of(loss=Component("picky", OnCall))
    variants = [{"name": "a"}, {"name": "b", "loss": [{"use": "mse"}, {"use": "picky", "name": "other"}]}]
    with pytest.raises(UsageError, match=r"^variant 'b': loss\.other\.few: is too few"):
        tiny_run(tmp_path / "run", registry=registry, variant=variants)


def test_a_component_that_cannot_work_at_all_is_named_by_its_key(tmp_path: Path) -> None:
    def analyzer(context: Any) -> Any:
        raise ComponentError("the SAE is a transcoder. Use an SAE.")

    registry = registry_of(analyzer=Component("picky", analyzer))
    with pytest.raises(UsageError, match=r"^analyzer\.other: the SAE is a transcoder"):
        tiny_run(tmp_path / "run", registry=registry, analyzer=[{"use": "picky", "name": "other"}])


class Outer:
    def __init__(
        self,
        *,
        inner: Annotated[ComponentOption, OfKind("loss"), Field(description="What it is made of.")] = ComponentOption(use="picky"),
    ) -> None:
        inner.build()

    def __call__(self, step: Any) -> Any: ...


def test_the_option_of_a_component_that_an_option_names(tmp_path: Path) -> None:
    registry = registry_of(loss=[Component("picky", OnBuild), Component("outer", Outer)])
    with pytest.raises(UsageError, match=r"^loss\.other\.inner\.few: is too few"):
        tiny_run(tmp_path / "run", registry=registry, loss=[{"use": "outer", "name": "other"}])


@pytest.mark.parametrize(
    ("refusing", "message"),
    [
        (lambda: TopK(8, 4, k=5), "k: 5 latents cannot be active"),
        (lambda: SyntheticSource(d_in=8, n_features=8, low=9.0), "low: 9.0 is more than high"),
        (lambda: Registry().find("architecture", "topk").build({"k": 5}, 8, 4), "k: 5 latents cannot be active"),
    ],
)
def test_used_from_python_the_option_stands_alone(refusing: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        refusing()
    assert str(caught.value).startswith(message)


def test_the_key_is_put_before_it_once() -> None:
    with pytest.raises(UsageError) as caught, under_key("callback.outer"), under_key("loss.inner"):
        refuse()
    assert str(caught.value) == "loss.inner.few: is too few. Give more."
    assert not isinstance(caught.value, OptionError)


@pytest.mark.parametrize("kind", ["loss", "metric", "analyzer", "graph_builder"])
def test_what_a_constructor_refuses_is_told_before_training(kind: str, tmp_path: Path) -> None:
    from saekit.run_file import parse_config
    from saekit.runner.plan import plan_run
    from saekit.testing.tiny import tiny_table

    table, key = section(kind)
    with pytest.raises(UsageError, match=f"^{key}.few: is too few"):
        plan_run(parse_config(tiny_table() | table, "a test"), registry_of(**{kind: Component("picky", OnBuild)}))
