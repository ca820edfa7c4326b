"""What is asked of a recipe."""

from __future__ import annotations

from saekit.errors import SaekitError
from saekit.run_file import parse_config, read_toml
from saekit.runner.compose import recipe_path
from saekit.runner.plan import plan_run
from saekit.testing.checks import any_kind
from saekit.testing.kit import Check, Failed, Subject


def can_be_planned(subject: Subject) -> None:
    path = recipe_path(subject.component)
    try:
        plan_run(parse_config(read_toml(path), path.name), subject.registry)
    except SaekitError as error:
        raise Failed(f"it cannot be planned: {error}") from error


CHECKS: tuple[Check, ...] = (
    *(check for check in any_kind.CHECKS if check.name not in ("options_documented", "defaults_are_valid")),
    Check("can_be_planned", "Its run file is whole: every name is known, every need is met.", can_be_planned),
)
