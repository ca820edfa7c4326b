"""Options that name a component: from a run file, through defaults and nesting, into saved SAEs and error messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field

import saekit
from saekit import Component, ComponentOption, OfKind, UsageError
from saekit.run_file import parse_config
from saekit.runner.plan import plan_run
from saekit.runner.provenance import plugins_used
from saekit.testing import registry_of
from saekit.testing.tiny import carried_out, tiny_table


class Wrapped(saekit.SparseAutoencoder):
    """An SAE that keeps what it was given."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        *,
        base: Annotated[ComponentOption, OfKind("architecture"), Field(description="What gates.")] = ComponentOption(use="topk"),
    ) -> None:
        super().__init__(d_in, d_sae, d_out)
        self.base = base

    def gate(self, x: torch.Tensor) -> saekit.Code:
        return self.dense_code(x, self.pre_activations(x).relu())

    def options(self) -> dict[str, Any]:
        return {"base": self.base.to_dict()}


def wanting(step: saekit.Step) -> torch.Tensor:
    """Needs what only some architectures provide."""
    return step.error.square().mean()


REGISTRY = registry_of(
    architecture=Component("wrapped", Wrapped, "An SAE around another."),
    loss=Component("wanting", wanting, "A loss.", needs=("l0_gradient",)),
    plugin="mine",
)


def options(given: dict[str, Any]) -> dict[str, Any]:
    return REGISTRY.find("architecture", "wrapped").validate(given, "architecture")


@pytest.mark.parametrize(
    ("given", "name", "found"),
    [
        ({"base": {"use": "topk", "k": 5}}, "topk", {"k": 5}),
        ({"base": {"use": "builtin.topk", "k": 5}}, "topk", {"k": 5}),
        ({"base": "standard"}, "standard", {"decoder_norm": "free"}),
        ({"base": {"use": "wrapped", "base": {"use": "topk", "k": 3}}}, "wrapped", {}),
    ],
)
def test_a_name_or_a_table_becomes_a_component_with_checked_options(
    given: dict[str, Any], name: str, found: dict[str, Any]
) -> None:
    base = options(given)["base"]
    assert base.component.name == name
    assert found.items() <= base.options.items()
    again = options({"base": json.loads(json.dumps(base.to_dict()))})["base"]
    assert again.to_dict() == base.to_dict()


def test_what_is_inside_is_inside() -> None:
    base = options({"base": {"use": "wrapped", "base": {"use": "topk", "k": 3}}})["base"]
    assert base.options["base"].options["k"] == 3
    assert base.build(8, 16, None).base.build(8, 16, None).options()["k"] == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"base": "topc"}, ("architecture.base", "topc", "topk")),
        ({"base": {"use": "topk", "k": 0}}, ("architecture.base.k", "greater than 0")),
        ({"base": {"use": "topk", "kk": 4}}, ("architecture.base.kk", "no option 'kk'")),
        ({"base": {"use": "wrapped", "base": {"use": "topk", "k": -1}}}, ("architecture.base.base.k",)),
        ({"base": {"k": 4}}, ("architecture.base.use", "required")),
        ({"base": 4}, ("architecture.base",)),
        ({"base": "mse"}, ("architecture.base", "mse")),
    ],
)
def test_a_mistake_is_named_with_its_whole_key(given: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        options(given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("stated", "is_it"),
    [
        ("topk", True),
        ({"use": "topk", "k": 5}, True),
        ({"use": "topk", "k": 6}, False),
        ("standard", False),
    ],
)
def test_whether_it_is_what_something_was_made_with(stated: Any, is_it: bool) -> None:
    made = options({"base": {"use": "topk", "k": 5}})["base"].to_dict()
    assert options({"base": stated})["base"].fits(made) is is_it


def test_it_is_saved_and_loaded_and_its_plugin_is_recorded(tmp_path: Path) -> None:
    table = tiny_table() | {"architecture": {"use": "wrapped", "d_sae": 64, "base": {"use": "topk", "k": 4}}}
    run = carried_out(table, tmp_path / "run", REGISTRY)
    sae = saekit.load_sae(run.directory / "sae", registry=REGISTRY)
    assert isinstance(sae, Wrapped)
    assert sae.base.options["k"] == 4
    assert {"mine", "builtin"} <= {plugin["name"] for plugin in plugins_used(run.plan)}


def test_what_the_named_component_provides_counts() -> None:
    table = tiny_table() | {"loss": [{"use": "mse"}, {"use": "wanting"}]}
    table["architecture"] = {"use": "wrapped", "d_sae": 64, "base": {"use": "topk", "k": 4}}
    with pytest.raises(UsageError, match="needs 'l0_gradient'"):
        plan_run(parse_config(table, "test"), REGISTRY)
    table["architecture"]["base"] = "jumprelu"
    plan_run(parse_config(table, "test"), REGISTRY)
