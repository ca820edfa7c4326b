"""The checks of a comparison, on finished tiny runs: of two variants, and without variants."""

from __future__ import annotations

import dataclasses

from saekit.testing.checks import analyzers, any_kind
from saekit.testing.kit import Check, Failed, Subject
from saekit.testing.tiny import finished_run


def takes_one(subject: Subject) -> None:
    place = subject.place / "one"
    place.mkdir(exist_ok=True)
    run = finished_run(subject.component.needs, subject.registry)
    try:
        analyzers.result_of(subject, dataclasses.replace(run.together, directory=place))
    except Failed:
        raise
    except Exception as error:
        raise Failed(
            f"it fails for a run without variants: {type(error).__name__}: {error}. Then `context.variants` has one entry; give a "
            "Result whose notes say what cannot be compared."
        ) from error


CHECKS = (
    *any_kind.CHECKS,
    Check("gives_a_result", "It runs on two variants and returns a `Result` whose scalars are plain.", analyzers.gives_a_result),
    Check("takes_one", "It runs on a run without variants, which has none of the analyzers that it may look for.", takes_one),
    Check("can_be_written", "`result.json` can hold its tables and figures.", analyzers.can_be_written),
    Check(
        "writes_in_its_directory",
        "It writes only under `context.directory`, and names what it wrote.",
        analyzers.writes_in_its_directory,
    ),
    Check("deterministic", "The same variants give the same result.", analyzers.deterministic),
    Check("inputs_unchanged", "It leaves every SAE and the model as they were.", analyzers.inputs_unchanged),
)
