"""`saekit run`."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable
from typing import Any

import click

from saekit.errors import SaekitError, UsageError
from saekit.kinds import SECTIONS
from saekit.terminal.output import echo_json


def _completed(function: str, *first: str) -> Callable[..., Any]:
    """A function of `completion.py`, which is imported when the shell asks it."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> Any:
        from saekit.cli import completion

        return getattr(completion, function)(*first, context, parameter, incomplete)

    return complete


def _component_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option of every section of the run file that holds components."""
    for section in reversed(SECTIONS.values()):
        command = click.option(
            section.option,
            section.name,
            multiple=section.many,
            metavar="NAME[:key=value,...]",
            help=section.help,
            shell_complete=_completed("components", section.name),
        )(command)
    return command


@click.command("run")
@click.argument("what", required=False, metavar="[RECIPE|FILE.toml]", shell_complete=_completed("recipes"))
@_component_options
@click.option(
    "-o", "--override", "overrides", multiple=True, metavar="key=value", help="Set any key, e.g. training.lr=1e-3.",
    shell_complete=_completed("overrides"),
)  # fmt: skip
@click.option("--plugin", "plugins", multiple=True, metavar="FILE.py", help="Load a Python file as a plugin.")
@click.option("--no-plugin", "no_plugins", multiple=True, metavar="NAME", help="Leave an installed plugin out.")
@click.option("--directory", metavar="DIR", help="The run directory; dated and named by default.")
@click.option("--resume", metavar="DIR", help="Continue an interrupted run.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; no model is loaded.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(
    what: str | None,
    overrides: tuple[str, ...],
    plugins: tuple[str, ...],
    no_plugins: tuple[str, ...],
    directory: str | None,
    resume: str | None,
    dry_run: bool,
    as_json: bool,
    **components: str | tuple[str, ...] | None,
) -> None:
    """Train an SAE and analyse it. Without an argument: the quickstart on the bundled model organism.

    RECIPE is a name from `saekit recipes`; FILE.toml a run file. Options add to what it says; -o changes it.
    """
    uses = {section: [given] if isinstance(given, str) else list(given or ()) for section, given in components.items()}
    if resume is not None and any([what, directory, *uses.values(), overrides, plugins, dry_run]):
        raise UsageError("--resume continues a run exactly as it was begun; give it no other options.")
    # With --json nothing but the document may reach stdout, whatever a plugin or a library prints.
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            if resume is not None:
                document = _resume(resume, no_plugins, as_json)
            else:
                document = _start(what, uses, overrides, plugins, no_plugins, directory, dry_run, as_json)
    except SaekitError as error:
        if as_json and error.summary is not None:
            echo_json(error.summary)
        raise
    if as_json:
        echo_json(document)


def _resume(where: str, no_plugins: tuple[str, ...], as_json: bool) -> dict[str, Any]:
    from saekit.api import resume

    return resume(where, no_plugins=no_plugins, view=_view(as_json)).summary


def _start(
    what: str | None,
    uses: dict[str, list[str]],
    overrides: tuple[str, ...],
    plugins: tuple[str, ...],
    no_plugins: tuple[str, ...],
    directory: str | None,
    dry_run: bool,
    as_json: bool,
) -> dict[str, Any]:
    """The summary of the run, or its plan with --dry-run."""
    from saekit.runner.compose import Request, compose
    from saekit.runner.plan import plan_run

    # What imports leave in memory stays to the end. Looking for garbage in it would take a third of a dry run's time.
    gc.disable()
    try:
        config, registry = compose(Request(what, uses, overrides, plugins, no_plugins))
        plan = plan_run(config, registry)
    finally:
        gc.freeze()
        gc.enable()
    if dry_run:
        from saekit.cli.show_plan import plan_as_json, print_plan

        if not as_json:
            print_plan(plan)
        return plan_as_json(plan)
    from saekit.api import start

    return start(plan, registry, directory, _view(as_json)).summary


def _view(as_json: bool) -> Any:
    from saekit.terminal import choose_view

    return choose_view(json=as_json)
