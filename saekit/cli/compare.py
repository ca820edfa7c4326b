"""`saekit compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from saekit.terminal.output import console, echo, echo_json

if TYPE_CHECKING:
    from rich.console import Console

    from saekit.report.compare import Comparison

WIDE = 160
"""Columns of text where there is no terminal."""
LONGEST = 48
"""Characters of a value of a run file; the page and --json have all of them."""


@click.command("compare")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="A column, e.g. analysis.features.dead, losses.mse.")
@click.option("--all", "everything", is_flag=True, help="Every value that any of the runs has.")
@click.option("--html", metavar="FILE", help="Write one self-contained page with the runs' curves over one another.")
@click.option("--curve", "curves", multiple=True, metavar="NAME", help="With --html: a curve, e.g. loss/mse; all by default.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    runs: tuple[str, ...],
    metrics: tuple[str, ...],
    everything: bool,
    html: str | None,
    curves: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show run directories side by side: their metrics, and the keys in which their configurations differ.

    The columns are the headline metrics, unless others are named. "-" marks what a run does not have, "not defined" what
    has no value.
    """
    from saekit.errors import UsageError
    from saekit.files import to_jsonable
    from saekit.report.compare import compare, comparison_page
    from saekit.report.write import write_html

    if curves and html is None:
        raise UsageError("--curve: belongs to --html FILE.")
    comparison = compare(runs, metrics, everything=everything)
    if html is not None:
        write_html(comparison_page(comparison, curves), Path(html))
    if as_json:
        echo_json(to_jsonable(comparison.to_json()))
        return
    _print(comparison, console() if sys.stdout.isatty() else console(width=WIDE))
    if html is not None:
        echo(html)


def _print(comparison: Comparison, to: Console) -> None:
    from rich.text import Text

    from saekit.report.compare import cells, in_numbers, setting
    from saekit.wording import clean

    sides = comparison.sides
    for side in sides:
        if side.state:
            to.print(Text(f"! {clean(side.name)} is unfinished: {side.state}.", style="yellow"))
    for message in comparison.warnings:
        to.print(Text(f"! {clean(message)}", style="yellow"))
    values = {name: [cells(side, [name])[0].text for side in sides] for name in comparison.columns}
    names = [side.name for side in sides]
    if values:
        numeric = {name for name in values if all(in_numbers(side.values.get(name)) for side in sides)}
        _tables(names, values, numeric, to)
    differing = {key: [setting(side, key) for side in sides] for key in comparison.differences}
    if differing:
        to.print(Text("\nWhere the configurations differ", style="bold"))
        numeric = {key for key in differing if all(in_numbers(side.config.get(key)) for side in sides)}
        _tables(names, differing, numeric, to)
    elif len(sides) > 1:
        to.print("\nThe configurations are the same, or not known.")


def _tables(names: list[str], columns: dict[str, list[str]], numeric: set[str], to: Console) -> None:
    """Rows of runs; as many columns a table as there is room for. numeric: the columns that hold numbers."""
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    from saekit.wording import clean

    def short(text: str) -> Text:
        text = clean(text)
        return Text(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")

    first = [short(name) for name in names]
    left = list(columns.items())
    while left:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
        table.add_column("run", no_wrap=True)
        room = to.width - max(cell_len("run"), *(text.cell_len for text in first)) - 2
        shown: list[list[Text]] = []
        while left:
            name, texts = left[0]
            wanted = max(cell_len(clean(name)), *(short(text).cell_len for text in texts)) + 3
            if shown and wanted > room:
                break
            room -= wanted
            table.add_column(Text(clean(name)), justify="right" if name in numeric else "left", overflow="fold")
            shown.append([short(text) for text in texts])
            left.pop(0)
        for row, name_text in enumerate(first):
            table.add_row(name_text, *(column[row] for column in shown))
        to.print()
        to.print(table)
