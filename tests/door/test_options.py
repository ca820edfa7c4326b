"""Options that are inherited: from a base class in another module, and from dataclasses."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saekit.cli.completion import option_names
from saekit.component import Component
from saekit.errors import PluginError
from saekit.registered import RegisteredComponent
from saekit.testing import registry_of

BASE = """
    from __future__ import annotations
    from dataclasses import dataclass, field
    from typing import Annotated, ClassVar
    from pydantic import Field

    Share = Annotated[float, Field(gt=0, lt=1, description="A share.")]

    class Plain:
        def __init__(self, *, share: Share = 0.5) -> None:
            self.share = share

    @dataclass(kw_only=True)
    class Shared:
        share: Share
        names: Annotated[list[str], Field(description="Names.")] = field(default_factory=lambda: ["a"])
        kinds: ClassVar[tuple[str, ...]] = ()
        made: int = field(init=False, default=0)
"""
DERIVED = """
    from __future__ import annotations
    from dataclasses import dataclass
    from typing import Annotated
    from pydantic import Field
    from options_base import Plain, Shared

    class Inherits(Plain): ...

    @dataclass(kw_only=True)
    class Adds(Shared):
        first: int
        share: Annotated[float, Field(gt=0, lt=0.5, description="A smaller share.")] = 0.25
        last: bool = True

    @dataclass(kw_only=True)
    class Left(Shared):
        left: int = 1

    @dataclass(kw_only=True)
    class Right(Shared):
        right: int = 2

    @dataclass(kw_only=True)
    class Both(Left, Right):
        both: int = 3

    class Own(Adds):
        def __init__(self, *, only: Annotated[int, Field(description="The only one.")] = 1) -> None: ...
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, text in (("options_base", BASE), ("options_derived", DERIVED)):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("options_base", "options_derived"):
        sys.modules.pop(name, None)


def component(target: Any) -> RegisteredComponent:
    return registry_of(loss=Component("it", target)).find("loss", "it")


@pytest.mark.parametrize(
    ("name", "required", "defaults"),
    [
        ("Inherits", [], {"share": 0.5}),
        ("Shared", ["share"], {"names": ["a"]}),
        ("Adds", ["first"], {"share": 0.25, "names": ["a"], "last": True}),
        ("Both", ["share"], {"names": ["a"], "right": 2, "left": 1, "both": 3}),
        ("Own", [], {"only": 1}),
    ],
)
def test_options_come_from_base_classes(name: str, required: list[str], defaults: dict[str, Any]) -> None:
    here = component(f"options_derived:{name}")
    assert option_names(here) == [*required, *defaults]
    assert "options_derived" not in sys.modules  # completion reads the source
    fields = here.options_model().model_fields
    assert list(fields) == [*required, *defaults]
    assert [key for key, field in fields.items() if field.is_required()] == required
    assert {key: field.default for key, field in fields.items() if key in defaults} == defaults


def test_types_and_descriptions_are_those_of_the_class_that_declares_the_option() -> None:
    shared, adds = (component(f"options_derived:{name}").options_model().model_fields for name in ("Shared", "Adds"))
    assert shared["share"].description == "A share."
    assert adds["share"].description == "A smaller share."
    assert adds["names"].description == "Names."
    for name, options, message in (
        ("Shared", {"share": 1.5}, "less than 1"),
        ("Adds", {"first": 1, "share": 0.7}, "less than 0.5"),
        ("Adds", {"first": 1, "names": [1]}, "valid string"),
    ):
        with pytest.raises(Exception, match=message):
            component(f"options_derived:{name}").validate(options, "loss.it")


def test_a_default_from_a_factory_is_not_shared() -> None:
    adds = component("options_derived:Adds")
    first, second = (adds.build(adds.validate({"first": 1}, "loss.it")) for _ in range(2))
    assert (first.first, first.share, first.names) == (1, 0.25, ["a"])
    first.names.append("b")
    assert second.names == ["a"] and adds.validate({"first": 1}, "loss.it")["names"] == ["a"]


def test_a_type_that_the_declaring_module_does_not_know_is_refused() -> None:
    class Unknown:
        def __init__(self, *, share: Nowhere = 1) -> None:  # type: ignore[name-defined]  # noqa: F821
            ...

    with pytest.raises(PluginError, match="the type of option 'share', 'Nowhere', cannot be read"):
        component(Unknown).options_model()
