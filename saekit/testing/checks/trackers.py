"""The checks of a tracker, in tiny trainings."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

from saekit.errors import SaekitError
from saekit.listeners import Listener, Listeners
from saekit.protocols import RunInfo
from saekit.result import Result
from saekit.run_directory import RunDirectory
from saekit.testing.checks import any_kind, listening
from saekit.testing.kit import Check, Failed, Subject
from saekit.testing.tiny import carried_out, table_for


def survives_every_hook(subject: Subject) -> None:
    listeners = Listeners()
    listeners.add(Listener("tracker", subject.build(), subject.component.origin, vital=False))
    place = RunDirectory(subject.place / "run")
    place.path.mkdir()
    place.run_toml.write_text("", encoding="utf-8")
    for hook, values in _lifecycle(place, subject):
        listeners.emit(hook, **values)
    if listeners.warnings:
        raise Failed(listeners.warnings[0])


def a_failing_disk_only_warns(subject: Subject) -> None:
    blocked = subject.place / "a_file"
    blocked.write_text("", encoding="utf-8")
    listeners = Listeners()
    listeners.add(Listener("tracker", subject.build(), subject.component.origin, vital=False))
    tempfile.tempdir = str(subject.place)  # some write there instead
    try:
        _tell_all(listeners, RunDirectory(blocked / "run"), subject)  # nothing can be written below a file
    finally:
        tempfile.tempdir = None


def _tell_all(listeners: Listeners, place: RunDirectory, subject: Subject) -> None:
    for hook, values in _lifecycle(place, subject):
        try:
            listeners.emit(hook, **values)
        except SaekitError as error:
            raise Failed(
                f"if its directory cannot be written, it stops the run, in {hook}: {error} Raise UsageError only for a mistake "
                "of the user, and let any other error through: the run drops the tracker with a warning."
            ) from error


def changes_nothing(subject: Subject) -> None:
    bare = carried_out(table_for(subject.component.needs, subject.registry), subject.place / "bare", subject.registry)
    with_it = listening.trained(subject, "with")
    if (bare.directory / listening.WEIGHTS).read_bytes() != (with_it.directory / listening.WEIGHTS).read_bytes():
        raise Failed("a run with it ends at different weights than one without. A tracker records; a callback may change the run.")


def _lifecycle(place: RunDirectory, subject: Subject) -> list[tuple[str, dict[str, Any]]]:
    """Every lifecycle hook once with its arguments, in the order of a run in `place`."""
    from saekit.run_file import parse_config
    from saekit.runner.plan import plan_run

    config = parse_config(table_for((), subject.registry), "the tiny run")
    plan = plan_run(config, subject.registry)
    run = RunInfo(place, config, plan, "")
    trainer = SimpleNamespace(number=1, total_steps=2, variant="", tokens=32)
    values = {"loss": 1.0, "explained_variance": float("nan"), "tokens": 32.0}
    result = Result(scalars={"living": 3, "undefined": None})
    return [
        ("run_started", {"run": run}),
        ("phase_started", {"phase": "train", "total": 64}),
        ("training_started", {"trainer": trainer}),
        ("step_started", {"trainer": trainer, "number": 0}),
        ("gradients_ready", {"trainer": trainer, "number": 0}),
        ("step_ended", {"trainer": trainer, "number": 0}),
        ("logged", {"trainer": trainer, "number": 0, "values": values}),
        ("checkpoint_saved", {"trainer": trainer, "number": 0, "path": place.checkpoints}),
        ("phase_advanced", {"phase": "train", "done": 64}),
        ("phase_ended", {"phase": "train", "seconds": 0.5}),
        ("evaluated", {"metrics": {"l0": 3.0, "recovery": None}, "variant": ""}),
        ("analysed", {"name": "features", "result": result, "variant": ""}),
        ("warned", {"message": "a warning"}),
        ("run_finished", {"run": run, "summary": {}}),
        ("run_failed", {"run": run, "error": RuntimeError("a failure")}),
    ]


CHECKS: tuple[Check, ...] = (
    *any_kind.CHECKS,
    Check("has_hooks", "One of its methods is a lifecycle hook.", listening.has_hooks),
    Check("runs_in_a_training", "A training that uses it finishes, and does not drop it.", listening.runs_in_a_training),
    Check("survives_every_hook", "It survives every lifecycle hook, with values that are not defined.", survives_every_hook),
    Check("a_failing_disk_only_warns", "If its directory cannot be written, the run goes on.", a_failing_disk_only_warns),
    Check("changes_nothing", "A run with it ends at the same bits as one without.", changes_nothing),
    Check(
        "state_round_trip",
        "A checkpoint can hold what `state_dict` returns, and `load_state_dict` restores it.",
        listening.state_round_trip,
    ),
)
