"""The checks of a callback, in tiny trainings."""

from __future__ import annotations

from saekit.testing.checks import any_kind, listening
from saekit.testing.kit import Check, Failed, Subject


def deterministic(subject: Subject) -> None:
    first, second = (listening.trained(subject, name).directory / listening.WEIGHTS for name in ("first", "second"))
    if first.read_bytes() != second.read_bytes():
        raise Failed("the same run ends at different weights the second time. Draw from trainer.generator, and from nothing else.")


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
)
