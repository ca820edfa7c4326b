"""The command line: one file a command, imported only when that command is called."""

from __future__ import annotations

import contextlib
import importlib
import io
import keyword
import os
import sys
import traceback
from typing import Any, NoReturn

import click

from saekit import plugin_commands
from saekit.errors import ExitCode, SaekitError
from saekit.terminal.output import echo, print_what_cannot_be_encoded
from saekit.wording import clean_lines

COMMANDS = {
    "run": "Train an SAE and analyse it: a recipe, a run file, or names on the command line.",
    "plugins": "List the installed components, or show one with its options.",
    "check": "Check that a component, or all of a plugin's, keep the contract of their kind.",
    "new": "Write a package around one component of your own: code, test, run file, README.",
    "recipes": "List the ready-made run files.",
    "report": "Rebuild the report.html of a run.",
    "compare": "Show runs side by side: metrics, what differs in their configurations, curves.",
    "import": "Import an SAE of SAELens, dictionary_learning or sparsify.",
    "export": "Write an SAE in the format of one of those libraries.",
    "schema": "Print the JSON Schema of a run file.",
    "doctor": "Examine the installation: versions, plugins, slow imports, devices.",
}


class LazyGroup(click.Group):
    """Knows its commands, and those of plugins, by name and one line, so that `--help` imports none of them."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [*COMMANDS, *plugin_commands.summaries(_registry(), COMMANDS)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            try:
                return plugin_commands.find(name, _registry(), COMMANDS)
            except SaekitError:
                if context.resilient_parsing:  # while the shell completes
                    return None
                raise
        module = f"{name}_" if keyword.iskeyword(name) else name  # import.py could not be imported
        return importlib.import_module(f"saekit.cli.{module}").command

    def get_help(self, context: click.Context) -> str:
        return clean_lines(super().get_help(context))

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        registry = _registry()
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items(), *plugin_commands.summaries(registry, COMMANDS).items()])
        for problem in plugin_commands.clashes(registry, COMMANDS).values():
            formatter.write_paragraph()
            formatter.write_text(problem)


def _registry() -> Any:
    from saekit.plugins import Registry

    return Registry()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="saekit")
def cli() -> None:
    """Train sparse autoencoders on a network's activations, and ask questions of what they found.

    Exit codes: 0 done, 1 the run failed, 2 usage or configuration, 3 a plugin failed, 130 interrupted
    (129 by SIGHUP, 143 by SIGTERM).
    """


def main() -> None:
    """The entry point: runs a command and turns its errors into one message and the documented exit code."""
    # torch reads this once, at its first allocation: large tensors in large pages, which spares a training step on the
    # CPU a sixth of its time (docs/performance.md). A value that the user has set is kept.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    print_what_cannot_be_encoded()
    try:
        cli(standalone_mode=False)
    except SaekitError as error:
        with contextlib.suppress(OSError):  # after SIGHUP there is no terminal any more
            echo(f"error: {error}", err=True)
        sys.exit(int(error.exit_code))
    except click.ClickException as error:
        told = io.StringIO()
        error.show(told)
        echo(told.getvalue(), err=True, nl=False)
        sys.exit(int(ExitCode.USAGE))
    except (KeyboardInterrupt, click.Abort):
        echo("interrupted.", err=True)
        sys.exit(int(ExitCode.INTERRUPTED))
    except BrokenPipeError:
        sys.exit(int(ExitCode.OK))
    except OSError as error:
        if error.filename is None:
            _report_bug()
        # A file that the user named, or one beside it: it may not be read, or its name is too long.
        echo(f"error: {os.fsdecode(error.filename)}: {error.strerror}. Name another file, or change its rights.", err=True)
        sys.exit(int(ExitCode.USAGE))
    except Exception:
        _report_bug()


def _report_bug() -> NoReturn:
    echo(traceback.format_exc(), err=True)
    echo("error: this is a bug in saekit; please report it with the lines above.", err=True)
    sys.exit(int(ExitCode.RUN_FAILED))
