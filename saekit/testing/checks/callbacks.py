"""The checks of a callback, in tiny trainings."""

from __future__ import annotations

import json

from saekit.result import Result
from saekit.testing.checks import any_kind, listening
from saekit.testing.checks.shared import changed, copied
from saekit.testing.kit import Check, Failed, NotApplicable, Subject


def deterministic(subject: Subject) -> None:
    first, second = (listening.trained(subject, name).directory / listening.WEIGHTS for name in ("first", "second"))
    if first.read_bytes() != second.read_bytes():
        raise Failed("the same run ends at different weights the second time. Draw from trainer.generator, and from nothing else.")


def result_is_whole(subject: Subject) -> None:
    callback = listening.listener_of(subject)
    if not callable(getattr(callback, "result", None)):
        raise NotApplicable("it has no `result`.")
    first, other = callback.result(), subject.build()
    if not isinstance(first, Result):
        raise Failed(f"`result` returns {type(first).__name__}. Return a saekit.Result.")
    for name, value in first.scalars.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, int | float)):
            raise Failed(f"scalar {name!r} is {type(value).__name__}. Give plain numbers: float(...), or None if undefined.")
    try:
        json.dumps(first.to_json())
    except (TypeError, ValueError) as error:
        raise Failed(f"its result cannot be written as JSON: {error}. Give lists and plain numbers: tensor.tolist().") from None
    if hasattr(callback, "state_dict"):
        other.load_state_dict(callback.state_dict())
    what = changed(copied(first.to_json()), copied(other.result().to_json()))
    if what:
        raise Failed(
            f"{what} of its result is lost when a run is resumed after its last step. Put what `result` needs into state_dict."
        )


CHECKS: tuple[Check, ...] = (
    *any_kind.CHECKS,
    Check("has_hooks", "One of its methods is a lifecycle hook.", listening.has_hooks),
    Check("runs_in_a_training", "A training that uses it finishes.", listening.runs_in_a_training),
    Check("deterministic", "The same training ends at the same weights, to the bit.", deterministic),
    Check(
        "state_round_trip",
        "A checkpoint can hold what `state_dict` returns, and `load_state_dict` restores it.",
        listening.state_round_trip,
    ),
    Check(
        "resumes_to_the_same_bits",
        "A training that is interrupted and resumed ends at the same bits as one that is not.",
        listening.resumes_to_the_same_bits,
    ),
    Check(
        "result_is_whole",
        "If it has `result`: it returns a `Result` that can be written, the same after `state_dict` and `load_state_dict`.",
        result_is_whole,
    ),
)
