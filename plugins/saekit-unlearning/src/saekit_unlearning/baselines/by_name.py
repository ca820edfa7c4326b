"""The baselines by the names that the analyzer's option `methods` knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from saekit import OptionError
from saekit_unlearning.baselines.baseline import Baseline
from saekit_unlearning.baselines.difference_of_means import DifferenceOfMeans
from saekit_unlearning.baselines.lora import LoRA
from saekit_unlearning.baselines.npo import NPO
from saekit_unlearning.baselines.oracle import Oracle
from saekit_unlearning.baselines.rmu import RMU
from saekit_unlearning.baselines.uniform import FineTuning
from saekit_unlearning.files import ORGANISM

BaselineName = Literal["fine_tuning", "npo", "lora", "rmu", "difference_of_means", "oracle"]
NAMES: tuple[BaselineName, ...] = get_args(BaselineName)
ORACLE: BaselineName = "oracle"

_MADE: dict[BaselineName, type] = {
    "fine_tuning": FineTuning,
    "npo": NPO,
    "lora": LoRA,
    "rmu": RMU,
    "difference_of_means": DifferenceOfMeans,
    "oracle": Oracle,
}


def baseline(name: BaselineName, options: Mapping[str, Any], data: str) -> Baseline:
    """The method with options of its own. data: the analyzer's option, which may have an oracle.

    OptionError for what cannot be done here, and for a wrong option."""
    made = _MADE[name]
    own = sorted(field.name for field in fields(made))
    for option in options:
        if option not in own:
            raise OptionError("baselines", f"{name} has no option {option!r}. Its options: {', '.join(own)}.")
    if name == "lora" and find_spec("peft") is None:
        raise OptionError(
            "methods", "lora needs peft. Install it: pip install 'saekit-unlearning[lora]', or leave lora out."
        )
    if name == ORACLE and "model" not in options:
        if data != ORGANISM:
            raise OptionError(
                "methods",
                f"there is no oracle for data = {data!r}, a model that never learned what is to be forgotten. Name one, "
                'baselines = { oracle = { model = "..." } }, or leave oracle out.',
            )
        from saekit import organism

        options = {**options, "model": str(organism.directory("oracle"))}
    try:
        found: Baseline = TypeAdapter(made).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise OptionError("baselines", f"{name}.{where} = {first['input']!r}: {first['msg']}.") from None
    return found


def oracle(options: Mapping[str, Any], data: str) -> Oracle | None:
    """The model that is named, else the organism's own; None if there is none for these data."""
    if "model" not in options and data != ORGANISM:
        return None
    found = baseline(ORACLE, options, data)
    assert isinstance(found, Oracle)
    return found
