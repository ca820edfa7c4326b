"""`render_summary`: the results of a run in one panel, from the content of `summary.json`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from saekit.run_directory import RunDirectory
from saekit.wording import clean, count, duration, held_out_amounts, interval, label, memory, number, with_intervals

WIDEST = 108
GAP = 4  # columns between two headline metrics


def render_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the summary to `console`. Missing keys are left out; None is shown as "not defined"."""
    width = min(console.width, WIDEST)
    sections: list[RenderableType] = [_what(summary), *_headline(summary, width), *_variants(summary, width)]
    facts = [(clean(name), items) for name, items in _facts(summary)]
    if facts:
        names = min(max(cell_len(name) for name, _ in facts), 20)
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", width=names, no_wrap=True)
        table.add_column(overflow="fold")
        for name, items in facts:
            table.add_row(Text(name), _flow(items, width - 8 - names))
        sections += [Text(), table]
    title = Text(clean(summary.get("run") or "run"), style="bold")
    spent = sum((summary.get("seconds") or {}).values())
    subtitle = Text(f"done in {duration(spent)}", style="dim") if spent else None
    console.print()
    console.print(
        Panel(Group(*sections), title=title, title_align="left", subtitle=subtitle, subtitle_align="right",
              border_style="cyan", padding=(1, 2), width=width)
    )  # fmt: skip
    for name, reason in (summary.get("failed") or {}).items():
        told = Text(f"✗ {clean(name)}: {clean(reason)}", style="bold red")
        console.print(Padding(told, (0, 2), expand=False), width=width)
    for note in _notes(summary):
        console.print(Padding(Text(clean(note)), (0, 2), expand=False), width=width)
    for message in summary.get("warnings") or []:
        console.print(Padding(Text(f"! {clean(message)}", style="yellow"), (0, 2), expand=False), width=width)
    for message in summary.get("notes") or []:
        console.print(Padding(Text(clean(message), style="dim"), (0, 2), expand=False), width=width)
    if summary.get("failed") or summary.get("warnings") or summary.get("notes") or any(_notes(summary)):
        console.print()
    # Paths are there to be copied: the terminal may wrap them, but they contain no line break.
    for name, text in _where(summary):
        console.print(Text.assemble("  ", (f"{name:<8}", "dim"), clean(text)), soft_wrap=True)
    console.print()


def _what(summary: dict[str, Any]) -> Text:
    sae = summary.get("sae") or {}
    variants = summary.get("variants") or {}
    line = Text(f"{len(variants)} variants" if variants else clean(sae.get("architecture") or "SAE"), style="bold")
    if sae.get("d_in") and sae.get("d_sae"):
        line.append(f"  {sae['d_in']:,} -> {sae['d_sae']:,} latents", style="not bold")
    site = " at ".join(clean(summary[key]) for key in ("model", "hook_point") if summary.get(key))
    if site:
        line.append(f"   {site}", style="not bold dim")
    return line


def _headline(summary: dict[str, Any], width: int) -> list[RenderableType]:
    """The headline metrics side by side, in as many rows as needed."""
    metrics = summary.get("metrics") or {}
    names = [name for name in summary.get("headline") or [] if name in metrics] or list(metrics)[:6]
    rows: list[list[str]] = []
    room = 0
    for name in names:
        needed = max(len(label(name)), len(number(metrics[name])), len(_interval(summary, name))) + GAP
        if room < needed or not rows:
            rows.append([])
            room = width - 6
        rows[-1].append(name)
        room -= needed
    sections: list[RenderableType] = []
    for row in rows:
        table = Table.grid(padding=(0, GAP, 0, 0))
        table.add_row(*(Text(clean(label(name)), style="dim") for name in row))
        table.add_row(*(_value(metrics[name], "bold cyan") for name in row))
        if any(_interval(summary, name) for name in row):
            table.add_row(*(Text(_interval(summary, name), style="dim") for name in row))
        sections += [Text(), table]
    return sections


def _variants(summary: dict[str, Any], width: int) -> list[RenderableType]:
    """A row for each variant: what it is, and its headline metrics, in as many tables as needed."""
    variants = summary.get("variants") or {}
    left = list(dict.fromkeys(name for own in variants.values() for name in own.get("headline") or []))
    first = max((cell_len(clean(name)) for name in variants), default=0)
    cells = {key: [_with_interval(own, own.get("metrics") or {}, key) for own in variants.values()] for key in left}
    widest = {key: max(8, *(cell.cell_len for cell in some)) for key, some in cells.items()}
    sections: list[RenderableType] = []
    while left or (variants and not sections):
        table = Table.grid(padding=(0, GAP, 0, 0))
        table.add_column(no_wrap=True)
        heads, room = [], width - 6 - first
        if not sections:
            heads = ["architecture", "latents"]
            room -= 2 * GAP + sum(map(len, heads))
        shown: list[str] = []
        while left and (not (heads or shown) or room >= max(len(label(left[0])), widest[left[0]]) + GAP):
            room -= max(len(label(left[0])), widest[left[0]]) + GAP
            shown.append(left.pop(0))
        for _ in (*heads, *shown):
            table.add_column(justify="right", no_wrap=True)
        table.add_row("", *(Text(clean(head), style="dim") for head in (*heads, *map(label, shown))))
        for name, own in variants.items():
            sae = own.get("sae") or {}
            what = [clean(sae.get("architecture") or ""), number(sae.get("d_sae"))] if heads else []
            metrics = own.get("metrics") or {}
            values = [_with_interval(own, metrics, key) for key in shown]
            table.add_row(Text(clean(name), style="bold"), *map(Text, what), *values)
        sections += [Text(), table]
    return sections


def _with_interval(own: dict[str, Any], metrics: dict[str, Any], name: str) -> Text:
    """A variant's value with its interval; empty if it has no such metric."""
    if name not in metrics:
        return Text("")
    ends = _interval(own, name)
    return _value(metrics[name], "bold cyan").append(f" ({ends})" if ends else "", "not bold dim")


def _facts(summary: dict[str, Any]) -> Iterator[tuple[str, list[Text]]]:
    """The rows below: a name, and items that must not be broken across lines."""
    headline = summary.get("headline") or []
    rest = {name: value for name, value in (summary.get("metrics") or {}).items() if headline and name not in headline}
    if rest:
        yield "also", _pairs(rest, beside=summary)
    seen = held_out_amounts(summary.get("held_out") or {})
    if seen:
        most = max(seen, key=lambda group: len(group[0]))  # the others are named
        yield "held out", [
            Text(group[1] if group is most else f"{', '.join(map(clean, group[0]))}: {group[1]}") for group in seen
        ]
    if summary.get("losses"):
        yield "losses", _pairs(summary["losses"], words=False)
    for name, scalars in (summary.get("analysis") or {}).items():
        yield name, _pairs(scalars) if scalars else [Text("no scalars", style="dim")]
    graph = summary.get("graph")
    if graph:
        yield "graph", [Text(clean(graph["builder"])), Text(f"{count(graph['edges'])} edges")]
    trained = []
    if summary.get("tokens"):
        steps = summary.get("steps")
        trained.append(f"{count(summary['tokens'])} tokens" + (f" in {steps:,} steps" if steps else ""))
    if summary.get("tokens_per_second"):
        trained.append(f"{count(summary['tokens_per_second'])} tokens/s")
    if summary.get("peak_memory_bytes"):
        trained.append(f"peak memory {memory(summary['peak_memory_bytes'])}")
    if trained:
        yield "trained", [Text(text) for text in trained]
    if summary.get("seconds"):
        spent = summary["seconds"].items()
        yield "time", [Text.assemble((f"{clean(phase)} ", "dim"), duration(seconds)) for phase, seconds in spent]


def _pairs(values: dict[str, Any], words: bool = True, beside: dict[str, Any] | None = None) -> list[Text]:
    """Names and values, with the intervals in the summary `beside`."""
    pairs = []
    for name, value, own in with_intervals(values):
        ends = _interval(beside or {}, name)
        pair = Text.assemble((clean(label(name) if words else name) + " ", "dim"), _value(value, ""))
        pairs.append(pair.append(f" ({ends})" if ends else own, "dim"))
    return pairs


def _interval(summary: dict[str, Any], name: str) -> str:
    """The interval of a metric; empty if it has none."""
    return interval(((summary.get("estimates") or {}).get(name) or {}).get("interval"))


def _notes(summary: dict[str, Any], variant: str = "") -> Iterator[str]:
    """What metrics and analyzers say of their numbers, those of each variant after its name."""
    for name, beside in (summary.get("estimates") or {}).items():
        if beside.get("note"):
            yield f"{variant}{label(name)}: {beside['note']}"
    for name, notes in (summary.get("analysis_notes") or {}).items():
        yield from (f"{variant}{name}: {note}" for note in notes)
    for name, own in (summary.get("variants") or {}).items():
        yield from _notes(own, f"{name}, ")


def _flow(items: list[Text], width: int) -> Text:
    """Items one after another; lines are broken only between two items."""
    flow, used = Text(), 0
    for item in items:
        if used and used + 3 + item.cell_len > width:
            flow.append("\n")
            used = 0
        flow.append("   " if used else "")
        flow.append_text(item)
        used += (3 if used else 0) + item.cell_len
    return flow


def _value(value: Any, style: str) -> Text:
    return Text(number(None), style="dim italic") if value is None else Text(clean(number(value)), style=style)


def _where(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the files are, and what to do next."""
    directory = str(summary.get("directory") or summary.get("run") or ".")
    place, quoted = RunDirectory(Path(directory)), shlex.quote(directory)
    variants = bool(summary.get("variants"))
    return [
        ("run", directory),
        ("report", str(place.report)),
        ("SAEs", str(place.variants)) if variants else ("SAE", str(place.sae)),
        ("next", f"saekit compare {quoted}" + ("" if variants else " OTHER_RUN")),
        ("", f"saekit report {quoted}"),
    ]
