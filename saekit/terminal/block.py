"""The live block: lines of text from a `RunState`, built by hand because nested tables are much slower to draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.text import Text

from saekit.terminal.state import LossRow, Phase, RunState, Training
from saekit.wording import clean, count, duration, is_constant, label, number, percent, with_intervals

WIDEST = 108  # longer lines are hard to follow
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
SPARKS = "▁▂▃▄▅▆▇█"
MARKS = {"waiting": ("·", "dim"), "done": ("✓", "green"), "failed": ("✗", "bold red")}
NAME = 22  # columns for the name of a loss or a measure
VALUE = 11  # columns for a number


def draw(state: RunState, width: int, height: int, now: float) -> Group:
    """The block for a terminal of this size. If it does not fit, first blank lines go, then rows."""
    width = min(width, WIDEST)
    lines: list[Text] = []
    for loosely, most in ((True, 99), (False, 99), (False, 5), (False, 2)):
        lines = _block(state, width, now, loosely, most)
        if len(lines) < height:
            break
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
        line.truncate(width, overflow="ellipsis")
    return Group(*lines[: max(height - 1, 1)])


def _block(state: RunState, width: int, now: float, loosely: bool, most: int) -> list[Text]:
    """All sections; `most` is the largest number of rows in a section that can grow."""
    training = list(state.training.items())
    if len(training) == 1:
        trained = _training(training[0][1], state, width, now, loosely, most)
    else:
        trained = _variants(training, width, most)
    sections = [
        _header(state),
        [_phase(phase, width, now, state.harvested) for phase in state.shown_phases()],
        trained,
        _held_out(state.metrics, width, most),
        _analyses(state, most),
        _warnings(state, min(most, 3), width),
    ]
    lines: list[Text] = []
    for section in filter(None, sections):
        if lines and loosely:
            lines.append(Text())
        lines += section
    return lines


def _header(state: RunState) -> list[Text]:
    line = Text.assemble("  ", ("saekit", "bold cyan"), "  ")
    line.append(clean(state.title), style="bold")
    line.append(f"  {clean(state.subject)}", style="dim")
    return [line]


def _phase(phase: Phase, width: int, now: float, harvested: float | None) -> Text:
    mark, style = MARKS.get(phase.status) or (SPINNER[int(now * 8) % len(SPINNER)], "cyan")
    line = Text.assemble("  ", (mark, style), " ")
    line.append(set_cell_size(clean(phase.name), 10), style="dim" if phase.status == "waiting" else "")
    if phase.status == "waiting":
        return line
    fraction = phase.fraction
    line.append_text(_bar(fraction, max(width - 52, 10), phase.status))
    line.append(f" {percent(fraction) if fraction is not None else '':>6}")
    line.append(f" {duration(phase.elapsed(now)):>12}", style="dim" if phase.status == "done" else "")
    left = phase.left(now)
    if left is not None:
        line.append(f"  {duration(left)} left", style="cyan")
    if phase.status == "running" and harvested is not None:
        line.append(f"  harvest {percent(harvested)}", style="dim")
    return line


def _bar(fraction: float | None, width: int, status: str) -> Text:
    """A thin bar with half-cell steps; empty if the total is not known."""
    style = {"done": "green", "failed": "red"}.get(status, "cyan")
    halves = int((fraction or 0.0) * width * 2)
    full, half = divmod(halves, 2)
    bar = Text("━" * full + "╸" * half, style=f"dim {style}" if status == "done" else style)
    bar.append("━" * (width - full - half), style="dim bright_black")
    return bar


def _training(training: Training, state: RunState, width: int, now: float, loosely: bool, most: int) -> list[Text]:
    lines = [_progress(training, state)]
    rows = training.losses()
    if rows or "loss" in training.values:
        lines += [Text()] if loosely else []
        lines += _losses(training, rows, width, most)
    measures = [(label(name), _measure(name, value, training)) for name, value in training.measures().items()]
    if measures:
        lines += [Text()] if loosely else []
        lines += _grid("", measures[: 4 * most], width)
    return lines


def _progress(training: Training, state: RunState) -> Text:
    values, phase = training.values, state.phase("train")
    step = f"step {training.steps:,}" + (f" of {training.total_steps:,}" if training.total_steps else "")
    parts = [step]
    if values.get("tokens") is not None:
        parts.append(f"{count(values['tokens'])}{f' of {count(phase.total)}' if phase.total else ''} tokens")
    if values.get("tokens_per_second") is not None:
        parts.append(f"{count(values['tokens_per_second'])} tokens/s")
    if values.get("lr") is not None:
        parts.append(f"lr {values['lr']:.3g}")
    return Text("  " + "   ".join(parts))


def _losses(training: Training, rows: list[LossRow], width: int, most: int) -> list[Text]:
    heads = f"  {'loss':<{NAME}}{'value':>{VALUE}}{'weight':>{VALUE}}{'in total':>{VALUE}}"
    lines = [Text(heads, style="dim")]
    sparks = max(width - len(heads) - 5, 0)
    if "loss" in training.values:
        total = _cells("total", "", "", number(training.values["loss"]), style="bold")
        lines.append(total.append_text(_sparkline(training.trends["loss"].points(sparks))))
    for row in rows[:most]:
        contribution = "" if row.contribution is None else number(row.contribution)
        line = _cells(row.name, number(row.value), "" if row.weight is None else f"{row.weight:.4g}", contribution)
        lines.append(line.append_text(_sparkline(row.trend.points(sparks))))
    if len(rows) > most:
        lines.append(Text(f"  and {len(rows) - most} more", style="dim"))
    return lines


def _cells(name: str, *values: str, style: str = "") -> Text:
    return Text("  " + set_cell_size(clean(name), NAME) + "".join(f"{v:>{VALUE}}" for v in values) + "   ", style=style)


def _sparkline(values: list[float]) -> Text:
    """The curve of a loss, on a logarithmic scale if all values are positive; one that is constant, on a scale that holds zero."""
    if len(values) < 2:
        return Text()
    if is_constant(values):
        values = [0.0, *values]
        low, high = min(values), max(values)
        values = values[1:]
    else:
        if min(values) > 0:
            values = [math.log(value) for value in values]
        low, high = min(values), max(values)
    levels = (int((value - low) / (high - low) * 7.999) if high > low else 0 for value in values)
    return Text("".join(SPARKS[level] for level in levels), style="not bold cyan")


def _measure(name: str, value: float, training: Training) -> str:
    if name == "dead" and training.d_sae:
        return f"{count(value)} ({100 * value / training.d_sae:.1f} %)"
    return number(value)


def _variants(training: list[tuple[str, Training]], width: int, most: int) -> list[Text]:
    """Several SAEs in one pass, one row for each."""
    if not training:
        return []
    heads = ("step", "loss", "expl. var.", "L0", "dead")
    lines = [Text("  " + " " * NAME + "".join(f"{head:>{VALUE}}" for head in heads), style="dim")]
    for name, one in training[: 4 * most]:
        values = [one.values.get(key) for key in ("loss", "explained_variance", "l0", "dead")]
        lines.append(_cells(name, count(one.steps), *("" if value is None else number(value) for value in values)))
    return lines


def _held_out(metrics: dict[str, dict[str, float | None]], width: int, most: int) -> list[Text]:
    """The metrics of one SAE, or one row for each of several SAEs with as many metrics as fit."""
    if len(metrics) <= 1:
        pairs = [(label(name), number(value)) for values in metrics.values() for name, value in values.items()]
        return _grid("held out", pairs[: 4 * most], width)
    columns: dict[str, int] = {}
    room = width - NAME - 2
    for name in dict.fromkeys(name for values in metrics.values() for name in values):
        columns[name] = max(cell_len(label(name)) + 2, VALUE)
        room -= columns[name]
        if room < 0:
            del columns[name]
            break
    heads = "".join(f"{clean(label(name)):>{size}}" for name, size in columns.items())
    lines = [Text("  " + set_cell_size("held out", NAME) + heads, style="dim")]
    for variant, values in list(metrics.items())[: 4 * most]:
        cells = ((number(values[name]) if name in values else "", size) for name, size in columns.items())
        lines.append(Text("  " + set_cell_size(clean(variant), NAME) + "".join(f"{v:>{size}}" for v, size in cells)))
    return lines


def _grid(title: str, pairs: list[tuple[str, str]], width: int) -> list[Text]:
    """Names and values in as many columns as fit."""
    if not pairs:
        return []
    cell = NAME + VALUE + 4
    columns = max((width - 2) // cell, 1)
    lines = [Text(f"  {title}", style="dim")] if title else []
    for start in range(0, len(pairs), columns):
        line = Text("  ")
        for name, value in pairs[start : start + columns]:
            room = max(cell - 4 - cell_len(value), 1)
            line.append(set_cell_size(clean(name) + " ", room), style="dim")
            line.append(value + "    ", style="dim italic" if value == "not defined" else "")
        lines.append(line)
    return lines


def _analyses(state: RunState, most: int) -> list[Text]:
    lines = []
    for name, scalars in list(state.analyses.items())[-most:]:
        line = Text(f"  {clean(name)}", style="bold")
        for key, value, interval in with_intervals(scalars):
            line.append(f"   {clean(label(key))} ", style="not bold dim")
            line.append(clean(number(value)) + interval, style="not bold")
        lines.append(line)
    return lines


def _warnings(state: RunState, most: int, width: int) -> list[Text]:
    lines = [
        Text(line, style="yellow")
        for message in state.warnings[-most:]
        for line in _wrapped(clean(message), width - 4, "  ! ", "    ")
    ]
    earlier = len(state.warnings) - most
    if earlier > 0:
        lines.append(Text(f"    and {earlier} earlier; all of them at the end", style="dim"))
    return lines


def _wrapped(text: str, width: int, first: str, rest: str) -> Iterator[str]:
    """The text in at most two lines; the summary at the end shows all of it."""
    words: Iterable[str] = text.split()
    lines = [""]
    for word in words:
        if lines[-1] and cell_len(lines[-1]) + 1 + cell_len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    if len(lines) > 2:
        lines = [lines[0], set_cell_size(lines[1], min(cell_len(lines[1]), width - 2)) + " …"]
    for position, line in enumerate(lines):
        yield (rest if position else first) + line
