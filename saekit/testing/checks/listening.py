"""The checks of both kinds of listener, callbacks and trackers, in tiny trainings that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saekit.errors import Interrupted
from saekit.hookspecs import PROJECT, Lifecycle, hookimpl
from saekit.protocols import Training
from saekit.run_directory import RunDirectory
from saekit.runner.plan import plan_run
from saekit.testing.checks.shared import changed, copied, through_a_checkpoint
from saekit.testing.kit import Failed, NotApplicable, Subject
from saekit.testing.tiny import TinyRun, carried_out, table_for
from saekit.training.trainer import Trainer

LABEL = "under_check"
WEIGHTS = Path("sae") / "sae_weights.safetensors"
_STOP = 7  # between the checkpoints of a tiny run, which come every 5 steps


def table_with(subject: Subject) -> dict[str, Any]:
    """The run file of a tiny run that has the listener."""
    table = table_for(subject.component.needs, subject.registry)
    given = {name: value for name, value in subject.options.items() if value is not None}
    entry = {"use": subject.component.qualified_name, "name": LABEL, **given}
    # In front of the others that the plan adds.
    kind = subject.component.kind
    return {**table, kind: [*table.get(kind, []), entry]}


def trained(subject: Subject, name: str, view: Any = None) -> TinyRun:
    """A whole run with the listener, in the directory `name`."""
    return carried_out(table_with(subject), subject.place / name, subject.registry, view)


def listener_of(subject: Subject) -> Any:
    """The listener as a run left it."""
    keeper = _Keeper()
    trained(subject, "kept", keeper)
    return keeper.instance


class _Keeper:
    """A view that keeps the listener under check."""

    instance: Any = None

    @hookimpl
    def step_ended(self, trainer: Training) -> None:
        assert isinstance(trainer, Trainer)
        for listener in trainer.listeners:
            if listener.label.endswith(f".{LABEL}"):
                self.instance = listener.instance


class _Stopper:
    """A view that interrupts the run in the middle of training, like Ctrl-C pressed twice."""

    @hookimpl
    def step_ended(self, number: int) -> None:
        if number == _STOP:
            raise KeyboardInterrupt


# --- the checks ------------------------------------------------------------------------------------------------


def has_hooks(subject: Subject) -> None:
    instance = subject.build()
    known = [name for name in vars(Lifecycle) if not name.startswith("_")]
    if not any(hasattr(getattr(instance, name, None), f"{PROJECT}_impl") for name in known):
        raise Failed(
            f"none of its methods is a lifecycle hook, so it would never be called. Mark one of {', '.join(known[:4])}, ... "
            "with @saekit.hookimpl."
        )


def runs_in_a_training(subject: Subject) -> None:
    run = trained(subject, "run")
    dropped = [w for w in run.summary["warnings"] if "dropped" in w]
    if dropped:
        raise Failed(dropped[0])


def state_round_trip(subject: Subject) -> None:
    instance, other = listener_of(subject), subject.build()
    if not hasattr(instance, "state_dict") or not hasattr(instance, "load_state_dict"):
        raise NotApplicable("it has no state_dict and load_state_dict, so a checkpoint holds no state of it.")
    state = through_a_checkpoint(instance.state_dict())
    before = copied(state)
    if state:
        other.load_state_dict(state)
    what = changed(before, copied(through_a_checkpoint(other.state_dict())))
    if what:
        raise Failed(f"load_state_dict does not restore {what!r}, which state_dict returned. Restore it there.")


def resumes_to_the_same_bits(subject: Subject) -> None:
    whole = trained(subject, "whole")
    place = subject.place / "interrupted"
    try:
        carried_out(table_with(subject), place, subject.registry, _Stopper())
    except Interrupted:
        pass
    else:
        raise NotApplicable("the run could not be interrupted.")
    resume(place, subject)
    if (whole.directory / WEIGHTS).read_bytes() != (place / WEIGHTS).read_bytes():
        raise Failed(
            "a run that was interrupted and resumed ends at different weights than one that was not. Put everything it keeps from "
            "step to step into state_dict, restore it in load_state_dict, and draw from trainer.generator."
        )


def resume(place: Path, subject: Subject) -> None:
    """Continue the run in `place`, with the same registry."""
    from saekit.runner.run import Run

    with RunDirectory.resume(str(place)) as (directory, config):
        Run(plan_run(config, subject.registry), directory, subject.registry).execute()
